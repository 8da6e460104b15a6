"""VQ-GAN image tokenizers for the Hugging Face ecosystem."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = [
    "QUANTIZERS",
    "AutoregressiveTokenConfig",
    "AutoregressiveTokenModel",
    "MaskedTokenConfig",
    "MaskedTokenModel",
    "QuantizerOutput",
    "TokenModelOutput",
    "TokenSampling",
    "VQGANConfig",
    "VQGANEncoderOutput",
    "VQGANImageProcessor",
    "VQGANLatentDiffusionPipeline",
    "VQGANModel",
    "VQGANOutput",
    "VQGANTokenPipeline",
]

# Importing torch, transformers and diffusers takes seconds. The command `hf-vqgan` (or `python -m hf_vqgan`, for which
# `-m` stands here while Python imports the package) answers --help and typing errors without them.
if TYPE_CHECKING or Path(sys.argv[0] if sys.argv else "").name not in ("hf-vqgan", "-m"):
    from .registration import (
        QUANTIZERS,
        AutoregressiveTokenConfig,
        AutoregressiveTokenModel,
        MaskedTokenConfig,
        MaskedTokenModel,
        QuantizerOutput,
        TokenModelOutput,
        TokenSampling,
        VQGANConfig,
        VQGANEncoderOutput,
        VQGANImageProcessor,
        VQGANLatentDiffusionPipeline,
        VQGANModel,
        VQGANOutput,
        VQGANTokenPipeline,
    )
else:

    def __getattr__(name: str):
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from . import registration

        return getattr(registration, name)
