#!/usr/bin/env python
"""`hf-vqgan evaluate`, to be started from the repository: hf_vqgan/commands/evaluate.py."""

from hf_vqgan.commands.evaluate import main

if __name__ == "__main__":
    main()
