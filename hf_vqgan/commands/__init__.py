"""One module for each command of `hf-vqgan`. `main` reads the flags in sys.argv; scripts/ call it as well."""
