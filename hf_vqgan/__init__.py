"""VQ-GAN image tokenizers for the Hugging Face ecosystem."""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Importing torch, transformers and diffusers takes seconds. The command `hf-vqgan` (or `python -m hf_vqgan`, for which
# `-m` stands here while Python imports the package) answers --help and typing errors without them.
if TYPE_CHECKING or Path(sys.argv[0] if sys.argv else "").name not in ("hf-vqgan", "-m"):
    from .registration import *  # noqa: F403
    from .registration import __all__  # noqa: F401
else:

    def __getattr__(name: str):
        if name.startswith("_"):  # what Python itself looks for in a package
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        registration = importlib.import_module(".registration", __name__)
        if name not in registration.__all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(registration, name)
