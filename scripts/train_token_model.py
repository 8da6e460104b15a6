#!/usr/bin/env python
"""`hf-vqgan train-tokens`, to be started from the repository: hf_vqgan/commands/train_tokens.py."""

from hf_vqgan.commands.train_tokens import main

if __name__ == "__main__":
    main()
