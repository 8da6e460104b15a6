"""What measures of a latent space work on: a model, images and their latents, and the networks that judge."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import datasets
import torch
from torch import Tensor

from ..data.images import ImageOptions, open_images
from ..losses.image_losses import LPIPS
from ..losses.lpips_weights import NETWORKS
from ..measurement.frechet import InceptionFeatures
from ..measurement.latent_space import Measure, bootstrap
from .autoencoders import Autoencoder, load_autoencoder
from .latent_definitions import define
from .latent_options import LatentAnalysisConfig


class NotApplicable(Exception):
    """Why a group of measures has nothing to say about this model and these images."""


@dataclass
class AnalysisImages:
    """
    Args:
        pixels (`Tensor` of shape `(N, 3, H, W)`): Images in [-1, 1].
        labels (`Tensor` of shape `(N,)`, *optional*): Their class numbers, if there is a label column.
        split (`str`): Where they are from.
        split_note (`str`, *optional*): Warns of a split that models may have been trained on.
    """

    pixels: Tensor
    labels: Tensor | None
    split: str
    split_note: str | None

    def to(self, device: torch.device) -> "AnalysisImages":
        return replace(
            self, pixels=self.pixels.to(device), labels=None if self.labels is None else self.labels.to(device)
        )


def load_images(dataset_name: str, config: LatentAnalysisConfig, resolution: int) -> AnalysisImages:
    """
    `config.max_samples` images drawn at random, since many datasets are sorted by class.

    Raises:
        ValueError: for a split or column that is not there, and for too few readable images.
    """
    options = ImageOptions.of(dataset_name, config, resolution=resolution, shuffle_seed=config.seed)
    images = open_images(options)
    labels = read_labels(images.rows, dataset_name, config.label_column)
    found = images.squares().read_all()
    count = 0 if found is None else len(found.rows)
    if count < 8:
        raise ValueError(
            f"dataset {dataset_name!r}, split {images.split!r}: {count} readable images; 8 or more are needed."
        )
    return AnalysisImages(found.pixels, None if labels is None else labels[found.rows], images.split, images.split_note)


def read_labels(rows: datasets.Dataset, name: str, column: str | None) -> Tensor | None:
    """Class numbers of a column of anything, by default the only one of class labels; `None` if there is none."""
    if column is None:
        columns = [key for key, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)]
        if len(columns) != 1:
            return None
        (column,) = columns
    if column not in rows.column_names:
        raise ValueError(f"dataset {name!r}: {column!r} is not a column; columns: {', '.join(rows.column_names)}.")
    if not isinstance(rows.features[column], datasets.ClassLabel | datasets.Value):
        raise ValueError(f"dataset {name!r}: {column!r} holds {rows.features[column]}; expected one label per image.")
    values = rows[column][:]
    numbers = {value: number for number, value in enumerate(sorted(set(values), key=str))}
    return torch.tensor([numbers[value] for value in values])


@dataclass
class FeatureExtractor:
    """
    What Fréchet distances are taken in.

    Args:
        name (`str`): `"inception"`, or `"lpips_"` and the network.
        upscale (`int`): By how much images are enlarged first.
        features (`Callable`): `(B, 3, H, W)` in [-1, 1] to `(B, F)`.
    """

    name: str
    upscale: int
    features: Callable[[Tensor], Tensor]


def pooled_features(perceptual: LPIPS, pixels: Tensor) -> Tensor:
    """
    Means over positions of LPIPS's unit-length features of all layers, `(B, F)`, times √F: the inner product over F,
    which is what KID's kernel takes, is then that of the means.
    """
    pooled = torch.cat([layer.mean(dim=(2, 3)) for layer in perceptual.features(pixels)], dim=1)
    return pooled * pooled.shape[1] ** 0.5


def build_extractor(config: LatentAnalysisConfig, perceptual: LPIPS, device: torch.device) -> FeatureExtractor:
    wanted = config.feature_extractor
    if wanted == "inception" or (wanted == "auto" and config.inception_weights_path):
        network = InceptionFeatures(config.inception_weights_path).to(device)
        return FeatureExtractor("inception", 1, lambda pixels: network(pixels)[0])
    name = f"lpips_{perceptual.net}"
    return FeatureExtractor(name, perceptual.upscale, lambda pixels: pooled_features(perceptual, pixels))


@dataclass
class Subject:
    """
    A model, images and their latents.

    Args:
        latents (`Tensor` of shape `(N, D, h, w)`): As `encode` gives them, not quantized.
        dataset_name (`str`): Where the images are from, and where the diffusability measure finds others to train on.

    Raises:
        ValueError: if the latents do not vary.
    """

    autoencoder: Autoencoder
    dataset_name: str
    images: AnalysisImages
    latents: Tensor
    perceptual: LPIPS
    extractor: FeatureExtractor
    config: LatentAnalysisConfig

    def __post_init__(self):
        self.mean = self.latents.mean(dim=(0, 2, 3), keepdim=True)
        self.std = float((self.latents - self.mean).square().mean().sqrt())
        if not self.std > 1e-6 * float(self.latents.abs().max()):  # below, it is rounding; or NaN
            raise ValueError(
                f"{self.autoencoder.name}: the latents of all images have the same value at every position (standard "
                f"deviation {self.std:g}): there is no space to measure."
            )
        self.centred = (self.latents - self.mean) / self.std  # where interpolation happens

    @property
    def pixels(self) -> Tensor:
        return self.images.pixels

    @property
    def codes(self) -> Tensor:
        """Codes of the images `(N, h, w, n)`."""
        if not self.autoencoder.is_discrete:
            raise NotApplicable("the model has no codes")
        return self.batched(self.encode_latents_to_indices, self.latents)

    def batched(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        parts = zip(*(part.split(self.config.batch_size) for part in inputs), strict=True)
        return torch.cat([function(*part) for part in parts])

    def encode(self, pixels: Tensor) -> Tensor:
        return self.autoencoder.encode(pixels).float()

    def encode_latents_to_indices(self, latents: Tensor) -> Tensor:
        indices = self.autoencoder.quantize(latents)[1]
        return indices if indices.ndim == 4 else indices[..., None]

    def encode_indices(self, pixels: Tensor) -> Tensor:
        return self.encode_latents_to_indices(self.encode(pixels))

    def decode(self, latents: Tensor) -> Tensor:
        """Continuous latents to pixels, clamped to [-1, 1]."""
        return self.autoencoder.decode(latents).float().clamp(-1, 1)

    def decode_quantized(self, latents: Tensor) -> Tensor:
        return self.decode(self.autoencoder.quantize(latents)[0])

    def decode_indices(self, indices: Tensor) -> Tensor:
        """Codes `(B, h, w, n)` to pixels, clamped to [-1, 1]."""
        model = self.autoencoder.model
        indices = indices if self.autoencoder.num_codebooks > 1 else indices[..., 0]
        return self.batched(lambda part: model.decode_indices(part).sample.float().clamp(-1, 1), indices)

    def decode_centred(self, centred: Tensor) -> Tensor:
        return self.batched(self.decode, centred * self.std + self.mean)

    def decode_centred_quantized(self, centred: Tensor) -> Tensor:
        return self.batched(self.decode_quantized, centred * self.std + self.mean)

    def codebooks(self) -> list[Tensor]:
        """The codes `(K, D)` of every codebook, those of the others held at number 0: differences are what they are."""
        quantizer = self.autoencoder.model.quantize
        books = []
        for column in range(quantizer.num_codebooks):
            numbers = torch.zeros(quantizer.num_codes, quantizer.num_codebooks, dtype=torch.int64)
            numbers[:, column] = torch.arange(quantizer.num_codes)
            numbers = numbers if quantizer.num_codebooks > 1 else numbers[:, 0]
            books.append(quantizer.code_vectors(numbers.to(self.latents.device)).detach().float())
        return books

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Pairs of different images' centred latents; no image is in two pairs, so pairs are independent."""
        order = torch.randperm(len(self.latents), generator=self.generator())[: len(self.latents) // 2 * 2]
        first, second = order.to(self.latents.device).chunk(2)
        return self.centred[first], self.centred[second]

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.config.seed)

    def mean_measure(self, name: str, values: Tensor, **settings) -> Measure:
        """The mean over independent rows, NaN ones left out; `name` and `settings` as `define` takes them."""
        values = values[values.isfinite()].double()
        if not len(values):
            raise NotApplicable("no image gives a figure")
        found = bootstrap(lambda rows: rows.mean(), values, seed=self.config.seed)
        return Measure(*found, **define(name, settings), n=len(values))

    def set_measure(self, name: str, statistic: Callable[..., float], *samples: Tensor, **settings) -> Measure:
        """A statistic that only all rows of `samples` together have, and that resampling moves."""
        found = bootstrap(statistic, *samples, resamples=200, seed=self.config.seed, recentre=True)
        return Measure(*found, **define(name, settings), n=len(samples[0]))


def prepare(model_name: str, dataset_name: str, config: LatentAnalysisConfig) -> Subject:
    """Load everything that measures work on."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    autoencoder = load_autoencoder(model_name).float().requires_grad_(False).to(device)
    if not autoencoder.has_decoder:
        raise ValueError(f"{model_name} has no decoder: there is nothing to see in its latent space.")
    factor, side = autoencoder.downsample_factor, config.resolution or autoencoder.model.config.sample_size
    if side % factor or side < 2 * factor:
        raise ValueError(
            f"resolution={side} must be a multiple of f={factor}, the downsampling factor, and 2f or more."
        )
    images = load_images(dataset_name, config, side).to(device)
    # Enlarged so far that half-size images, too, are large enough for the network.
    upscale = max(1, math.ceil(NETWORKS[config.perceptual_net].min_side / (side // 2)))
    perceptual = LPIPS(config.perceptual_net, config.perceptual_weights_path, upscale).to(device)
    latents = torch.cat([autoencoder.encode(part).float() for part in images.pixels.split(config.batch_size)])
    extractor = build_extractor(config, perceptual, device)
    return Subject(autoencoder, dataset_name, images, latents, perceptual, extractor, config)
