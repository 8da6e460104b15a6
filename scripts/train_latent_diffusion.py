#!/usr/bin/env python
"""`hf-vqgan train-diffusion`, to be started from the repository: hf_vqgan/commands/train_diffusion.py."""

from hf_vqgan.commands.train_diffusion import main

if __name__ == "__main__":
    main()
