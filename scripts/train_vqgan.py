#!/usr/bin/env python
"""`hf-vqgan train`, to be started from the repository: hf_vqgan/commands/train.py."""

from hf_vqgan.commands.train import main

if __name__ == "__main__":
    main()
