"""What training minimises: image losses and LPIPS, discriminators, latent regularizers, frozen backbones."""
