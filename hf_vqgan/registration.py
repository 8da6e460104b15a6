"""The package's public classes, made known to transformers and diffusers. `import hf_vqgan` does this."""

import diffusers
from diffusers.pipelines import pipeline_loading_utils
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from .configuration_token_model import AutoregressiveTokenConfig, MaskedTokenConfig
from .configuration_vqgan import VQGANConfig
from .image_processing_vqgan import VQGANImageProcessor
from .modeling_token_model import AutoregressiveTokenModel, MaskedTokenModel, TokenModelOutput, TokenSampling
from .modeling_vqgan import VQGANEncoderOutput, VQGANModel, VQGANOutput
from .pipelines import VQGANLatentDiffusionPipeline
from .quantizers import QUANTIZERS, QuantizerOutput
from .token_pipeline import VQGANTokenPipeline

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

AutoConfig.register("vqgan", VQGANConfig, exist_ok=True)
AutoModel.register(VQGANConfig, VQGANModel, exist_ok=True)
for _config, _model in (
    (AutoregressiveTokenConfig, AutoregressiveTokenModel),
    (MaskedTokenConfig, MaskedTokenModel),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    _config.register_for_auto_class()
    _model.register_for_auto_class("AutoModel")
AutoImageProcessor.register(VQGANConfig, image_processor_classes={"torchvision": VQGANImageProcessor}, exist_ok=True)

# Saved models carry the code that they need, for `trust_remote_code=True` where this package is not installed.
VQGANConfig.register_for_auto_class()
VQGANModel.register_for_auto_class("AutoModel")
VQGANImageProcessor.register_for_auto_class("AutoImageProcessor")

# diffusers loads a pipeline's components only through libraries on this list. It is not public API, so its absence
# costs the pipelines that name hf_vqgan, not the import of this package.
for _name in ("LOADABLE_CLASSES", "ALL_IMPORTABLE_CLASSES"):
    _methods = {
        name: ["save_pretrained", "from_pretrained"]
        for name in ("VQGANModel", "AutoregressiveTokenModel", "MaskedTokenModel")
    }
    if (_table := getattr(pipeline_loading_utils, _name, None)) is not None:
        _table.update({"hf_vqgan": _methods} if _name == "LOADABLE_CLASSES" else _methods)
# DiffusionPipeline.from_pretrained looks for the class that model_index.json names in diffusers itself, nowhere else.
diffusers.VQGANLatentDiffusionPipeline = VQGANLatentDiffusionPipeline
diffusers.VQGANTokenPipeline = VQGANTokenPipeline
