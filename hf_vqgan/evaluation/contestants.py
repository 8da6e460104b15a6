"""Who takes part in a comparison: models, and the codecs JPEG and WebP at the models' bits."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tvF

from ..data.datasets import to_pixel_values
from ..generation.encoded_dataset import weights_sha256
from ..measurement.frechet import to_bytes
from ..measurement.metrics import number_codes
from .autoencoders import Autoencoder
from .image_codecs import CODECS, encode_near
from .timing import Speed


@dataclass
class Reconstruction:
    """
    Args:
        sample (`Tensor` of shape `(B, 3, H, W)`): float32 in [-1, 1].
        codes (`Tensor`, *optional*): All codes, as numbers in [0, n*K), flat, on CPU.
        figures (`dict[str, Tensor]`): What only the contestant knows of each image, `(B,)`; see `figure_names`.
    """

    sample: Tensor
    codes: Tensor | None = None
    figures: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class ModelDetails:
    """What a model is. Of `AutoencoderKL`, which has no codes, `num_codes` and `num_codebooks` are `None`."""

    parameters: int
    dtype: str
    downsample_factor: int
    latent_channels: int
    num_codes: int | None
    num_codebooks: int | None
    weights_sha256: str


@dataclass
class CodecDetails:
    """How a codec was driven: its budget, mean quality, and the shares of images at reduced size and over budget."""

    budget_bits_per_pixel: float
    mean_quality: float
    shrunk_share: float
    over_budget_share: float

    def describe(self) -> str:
        note = f"mean quality {self.mean_quality:.1f}"
        if self.shrunk_share:
            note += f"; {self.shrunk_share:.1%} of the images at reduced size: the lowest quality was too large"
        if self.over_budget_share:
            note += f"; {self.over_budget_share:.1%} over the budget even so"
        return note


class ModelContestant:
    """
    Args:
        autocast (`Callable`): Gives the context in which the model runs.
    """

    figure_names: tuple[str, ...] = ()

    def __init__(self, autoencoder: Autoencoder, autocast: Callable[[], AbstractContextManager]):
        self.autoencoder, self.autocast = autoencoder, autocast
        self.name, self.kind = autoencoder.name, type(autoencoder.model).__name__
        self.num_codebooks = autoencoder.num_codebooks or 0
        self.num_counts = self.num_codebooks * (autoencoder.num_codes or 0)
        self.speed: Speed | None = None

    def reconstruct(self, pixels: Tensor) -> Reconstruction:
        """Images `(B, 3, H, W)` in [-1, 1] through the model."""
        with self.autocast():
            quantized, indices = self.autoencoder.quantize(self.autoencoder.encode(pixels))
            sample = self.autoencoder.decode(quantized).float().clamp(-1, 1)
        if indices is None:
            return Reconstruction(sample)
        return Reconstruction(
            sample, number_codes(indices, self.autoencoder.num_codes, self.autoencoder.num_codebooks).cpu()
        )

    def details(self, means: dict[str, float]) -> ModelDetails:
        model = self.autoencoder
        return ModelDetails(
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            dtype=str(model.model.dtype).removeprefix("torch."),
            downsample_factor=model.downsample_factor,
            latent_channels=model.latent_channels,
            num_codes=model.num_codes,
            num_codebooks=model.num_codebooks,
            weights_sha256=weights_sha256(model.model),
        )

    def bits_per_pixel(self, means: dict[str, float]) -> float | None:
        return self.autoencoder.bits_per_pixel


class CodecContestant:
    """JPEG or WebP, each image at about `bits_per_pixel`."""

    figure_names = ("bits_per_pixel", "quality", "shrunk", "over_budget")
    num_codebooks = num_counts = 0
    speed = None

    def __init__(self, codec: str, bits_per_pixel: float):
        self.codec, self.budget = codec, bits_per_pixel
        self.name, self.kind = f"{CODECS[codec]} at {bits_per_pixel:.4g} bits per pixel", CODECS[codec]

    def reconstruct(self, pixels: Tensor) -> Reconstruction:
        """Images `(B, 3, H, W)` in [-1, 1], rounded to 8 bits, through the codec."""
        area = pixels.shape[2] * pixels.shape[3]
        coded = [
            encode_near(tvF.to_pil_image(image), self.codec, self.budget * area) for image in to_bytes(pixels).cpu()
        ]
        figures = {
            "bits_per_pixel": [one.bits / area for one in coded],
            "quality": [one.quality for one in coded],
            "shrunk": [one.shrink > 1 for one in coded],
            "over_budget": [one.bits > 1.1 * self.budget * area for one in coded],
        }
        sample = torch.stack([to_pixel_values(tvF.pil_to_tensor(one.image)) for one in coded])
        tensors = {name: torch.tensor(values, dtype=torch.float64) for name, values in figures.items()}
        return Reconstruction(sample.to(pixels.device), figures=tensors)

    def details(self, means: dict[str, float]) -> CodecDetails:
        """From the means over images of `figure_names`."""
        return CodecDetails(self.budget, means["quality"], means["shrunk"], means["over_budget"])

    def bits_per_pixel(self, means: dict[str, float]) -> float | None:
        return means["bits_per_pixel"]


Contestant = ModelContestant | CodecContestant
