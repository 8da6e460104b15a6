"""Other projects' checkpoints, as VQGANModel and back."""
