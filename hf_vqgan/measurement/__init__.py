"""Metrics of reconstructions, codes and latent spaces, and their pictures. They take tensors and models, no runs."""
