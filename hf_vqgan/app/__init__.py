"""The page to play with a model."""
