#!/usr/bin/env python
"""`hf-vqgan app`, to be started from the repository: hf_vqgan/commands/app.py."""

from hf_vqgan.commands.app import main

if __name__ == "__main__":
    main()
