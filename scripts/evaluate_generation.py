#!/usr/bin/env python
"""`hf-vqgan evaluate-generation`, to be started from the repository: hf_vqgan/commands/evaluate_generation.py."""

from hf_vqgan.commands.evaluate_generation import main

if __name__ == "__main__":
    main()
