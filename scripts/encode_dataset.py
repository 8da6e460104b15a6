#!/usr/bin/env python
"""`hf-vqgan encode`, to be started from the repository: hf_vqgan/commands/encode.py."""

from hf_vqgan.commands.encode import main

if __name__ == "__main__":
    main()
