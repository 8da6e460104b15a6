#!/usr/bin/env python
"""`hf-vqgan convert`, to be started from the repository: hf_vqgan/commands/convert.py."""

from hf_vqgan.commands.convert import main

if __name__ == "__main__":
    main()
