"""What is built on a tokenizer: encoded datasets, diffusion models of the latents."""
