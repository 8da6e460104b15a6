"""
The networks in whose features sets of images are compared. What figures are called says which network it was: only
Inception's distance is FID.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel
from transformers.image_processing_base import ImageProcessingMixin

from ..files.sources import check_source
from ..losses.image_losses import LPIPS
from ..losses.lpips_weights import NETWORKS
from .frechet import CLASSES, FEATURES, InceptionFeatures, to_bytes

LPIPS_NETWORKS = {f"lpips_{net}": net for net in NETWORKS}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class ImageFeatures:
    """
    Args:
        pooled (`Tensor` of shape `(B, F)`): One vector per image.
        spatial (`Tensor` of shape `(B, 2023)`, *optional*): Of Inception, for sFID.
        logits (`Tensor` of shape `(B, 1008)`, *optional*): Of Inception, for the Inception score.
    """

    pooled: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None


class FeatureNetwork(nn.Module):
    """
    Images `(B, 3, H, W)` in [-1, 1], at any size, to [`ImageFeatures`] in float32. Frozen; always in eval mode.

    Pixels are rounded to 8 bits first: a set of picture files and the tensors they were saved from are the same.

    Args:
        id (`str`): Part of the figures' names.
        dim (`int`): F.
        details (`dict`): What else has to be the same for figures to be compared.
    """

    spatial_dim = logits_dim = 0

    def __init__(self, id: str, dim: int, **details):
        super().__init__()
        self.id, self.dim, self.details = id, dim, details

    def train(self, mode: bool = True) -> "FeatureNetwork":
        return super().train(False)

    @property
    def is_inception(self) -> bool:
        return isinstance(self, InceptionNetwork)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> ImageFeatures:
        return self.extract(to_bytes(pixels).float() / 127.5 - 1)

    def extract(self, pixels: Tensor) -> ImageFeatures:
        raise NotImplementedError


class InceptionNetwork(FeatureNetwork):
    """Inception-v3 as FID is defined on it; see [`InceptionFeatures`] for weights and errors."""

    logits_dim = CLASSES

    def __init__(self, weights_path: str | None = None):
        super().__init__("inception", FEATURES, network="torch-fidelity")
        self.network = InceptionFeatures(weights_path)
        self.spatial_dim = self.extract(torch.zeros(1, 3, 32, 32)).spatial.shape[1]

    def extract(self, pixels: Tensor) -> ImageFeatures:
        pooled, logits, spatial = self.network.with_spatial(pixels)
        return ImageFeatures(pooled, spatial, logits)


class LPIPSNetwork(FeatureNetwork):
    """
    Means over positions of LPIPS's unit-length features of all five layers, times √F: the inner product over F, which
    is what a kernel distance takes, is then that of the means.

    Args:
        id (`str`): `"lpips_alex"` or `"lpips_vgg"`.
    """

    def __init__(self, id: str, weights_path: str | None = None):
        network = LPIPS(LPIPS_NETWORKS[id], weights_path)
        super().__init__(id, sum(head.numel() for head in network.heads), layers="all", pooling="mean")
        self.network = network

    @property
    def min_side(self) -> int:
        return self.network.min_side

    def extract(self, pixels: Tensor) -> ImageFeatures:
        pooled = torch.cat([layer.mean(dim=(2, 3)) for layer in self.network.features(pixels)], dim=1)
        return ImageFeatures(pooled * self.dim**0.5)


class VisionModelNetwork(FeatureNetwork):
    """
    Any vision model of transformers, such as DINOv2 (https://huggingface.co/papers/2306.04675 makes the case for it):
    its `pooler_output` if that is trained, else the class token, else the mean over positions.

    The whole image is resized (bicubic, antialiased) to the square that the model's preprocessor_config.json crops to,
    nothing is cropped away; mean and deviation of colours are that file's, or ImageNet's if there is none.

    Args:
        name (`str`): Hub id or local folder that `transformers.AutoModel` loads.

    Raises:
        FileNotFoundError, ConnectionError: if there is no such model, or it cannot be reached.
        ValueError: if it is no model of images, or weights are missing from it.
    """

    def __init__(self, name: str):
        check_source(name)
        model, missing = _load_vision_model(name)
        settings = _read_preprocessor(name)
        side = _side_of(settings, model.config)
        super().__init__(feature_id(name), 0, side=side, resample="bicubic")
        self.model, self.side = model.requires_grad_(False).eval(), side
        self.trust_pooler = not any("pool" in key for key in missing)
        self.details["pooling"] = ""
        for key, default in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            found = tuple(settings.get(f"image_{key}") or default)
            self.details[key] = list(found)
            self.register_buffer(key, torch.tensor(found)[:, None, None], persistent=False)
        try:
            self.dim = self.extract(torch.zeros(1, 3, side, side)).pooled.shape[1]
        except (TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise ValueError(f"features {name!r}: not a model of images alone ({_first_line(error)}).") from error

    @torch.no_grad()
    def extract(self, pixels: Tensor) -> ImageFeatures:
        if pixels.shape[2:] != (self.side, self.side):
            size = (self.side, self.side)
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(-1, 1)
        output = self.model(pixel_values=(pixels / 2 + 0.5 - self.mean) / self.std)
        pooled, self.details["pooling"] = self._pool(output)
        return ImageFeatures(pooled.float())

    def _pool(self, output) -> tuple[Tensor, str]:
        pooled = getattr(output, "pooler_output", None)
        if pooled is not None and self.trust_pooler:
            return pooled.flatten(1), "pooler"
        states = output.last_hidden_state
        if states.ndim == 4:  # a convolutional network's
            return states.mean(dim=(2, 3)), "mean"
        patch = getattr(self.model.config, "patch_size", None)
        has_class_token = isinstance(patch, int) and states.shape[1] > (self.side // patch) ** 2
        return (states[:, 0], "class_token") if has_class_token else (states.mean(dim=1), "mean")


def _load_vision_model(name: str) -> tuple[nn.Module, list[str]]:
    """The model, of image-and-text models its vision part, and the weights that its files lack."""
    try:
        model, report = AutoModel.from_pretrained(name, output_loading_info=True, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ValueError(f"features {name!r}: transformers cannot load it ({_first_line(error)}).") from error
    missing = sorted(report["missing_keys"])
    if others := [key for key in missing if "pool" not in key]:
        raise ValueError(
            f"features {name!r}: weights are missing, which would be random ones: {', '.join(others[:3])}."
        )
    return getattr(model, "vision_model", model), missing


def _read_preprocessor(name: str) -> dict:
    try:
        return ImageProcessingMixin.get_image_processor_dict(name)[0]
    except OSError:  # it has no such file
        return {}


def _side_of(settings: dict, config) -> int:
    """The side of the square that the model takes, in pixels."""
    candidates = (settings.get("crop_size"), settings.get("size"), getattr(config, "image_size", None))
    for size in candidates:
        size = size.get("height", size.get("shortest_edge")) if isinstance(size, dict) else size
        size = size[0] if isinstance(size, (list, tuple)) else size
        if isinstance(size, int):
            return size
    return 224


def feature_id(name: str) -> str:
    """What figures in a model's features are called: the last part of its name, in small letters and underscores."""
    return re.sub(r"\W+", "_", Path(name).name.lower()).strip("_") or "model"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
