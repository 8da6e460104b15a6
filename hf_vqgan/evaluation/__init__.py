"""Models side by side on the same images: reconstruction, latent space, reports."""
