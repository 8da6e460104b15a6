#!/usr/bin/env python
"""`hf-vqgan analyze`, to be started from the repository: hf_vqgan/commands/analyze.py."""

from hf_vqgan.commands.analyze import main

if __name__ == "__main__":
    main()
