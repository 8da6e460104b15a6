"""What other people give: names, documents, checkpoints, pickles. Read without running anything in them."""
