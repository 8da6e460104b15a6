"""A training run: its configuration, the step, the loop, the folder it leaves, the flow of gradients."""
