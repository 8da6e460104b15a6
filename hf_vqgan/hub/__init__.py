"""Model cards, and pushing runs and pipelines."""
