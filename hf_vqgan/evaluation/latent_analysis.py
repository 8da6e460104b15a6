"""Everything `latent_space.py` can measure about one model on one dataset, as numbers with intervals."""

import copy
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import datasets
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..data.datasets import ImageTransform, ValidationImages, find_image_column, load_splits
from ..files.options import MAX_SEED, check_values, option
from ..generation.denoisers import LatentDiffusionConfig, denoising_loss
from ..generation.diffusion import train_latent_diffusion
from ..losses.image_losses import LPIPS
from ..losses.lpips_weights import NETWORKS
from ..measurement.frechet import FeatureMoments, InceptionFeatures, frechet_distance
from ..measurement.latent_space import (
    TRANSFORMS,
    Distance,
    Measure,
    PixelDistance,
    bootstrap,
    equivariance_error,
    exchange_code,
    high_frequency_share,
    jump_share,
    kernel_distance,
    level_noise,
    linear_probe,
    local_lipschitz,
    neighbour_consistency,
    neighbour_midpoints,
    participation_ratio,
    path_length,
    path_steps,
    project,
    replace_tokens,
    shift_stability,
    spectral_slope,
    straightness,
    unchanged_share,
)
from ..pipelines import normalize_latents
from .autoencoders import Autoencoder, load_autoencoder


@dataclass
class LatentAnalysisConfig:
    """How a latent space is analysed. Every field is a flag of `hf-vqgan analyze`."""

    # What is measured
    measures: list[str] = option([], "Groups of measures. Default: all but diffusability, which takes long.")
    output_dir: str = option(
        "runs/latent_space", "Folder for latent_space.json, report.md and pictures.", nonempty=True
    )
    compare: list[str] = option([], "Models to compare with: folders of earlier reports, or models to analyse first.")
    seed: int = option(0, "Seed of all that is drawn at random.", at_least=0, at_most=MAX_SEED)

    # On which images
    split: str | None = option(None, "Split. Default: validation, else test, else train.")
    max_samples: int = option(
        64, "Images, drawn at random from the split. Kept in memory, with their latents.", at_least=8
    )
    resolution: int | None = option(
        None, "Side in pixels of the central square. Default: the model's sample_size.", at_least=1
    )
    resize: int | None = option(
        None, "Shorter side before cropping. Default: resolution. 0: keep the image's size.", at_least=0
    )
    image_column: str | None = option(None, "Column with the images. Default: the only image column.")
    label_column: str | None = option(None, "Column for the linear probe. Default: the only column of class labels.")
    dataset_config_name: str | None = option(None, "Configuration of the dataset.")
    dataset_revision: str | None = option(None, "Branch, tag or commit of a Hub dataset.")
    cache_dir: str | None = option(None, "Where `datasets` keeps what it downloads.")

    # With what
    perceptual_net: str = option("alex", "LPIPS network.", choices=tuple(NETWORKS))
    perceptual_weights_path: str | None = option(None, "LPIPS trunk. Default: the cache, torchvision, a package index.")
    feature_extractor: str = option(
        "auto", "Of Fréchet distances. auto: Inception if its path is given, else LPIPS.",
        choices=("auto", "inception", "lpips"),
    )  # fmt: skip
    inception_weights_path: str | None = option(None, "torch-fidelity's Inception weights. Default: cache or download.")
    batch_size: int = option(16, "Images per forward pass.", at_least=1)

    # How
    path_steps: int = option(16, "Steps of an interpolation between two images.", at_least=1)
    path_epsilon: float = option(1e-3, "ε of the perceptual path length of continuous latents.", above=0)
    replaced_share: float = option(0.1, "Share of tokens that pFID replaces.", above=0, at_most=1)
    replaced_neighbours: int = option(8, "By one of so many nearest codes.", at_least=1)
    lipschitz_images: int = option(16, "Images at which the decoder's Lipschitz constant is taken.", at_least=1)
    lipschitz_iterations: int = option(10, "Power iterations.", at_least=1)
    consistency_contexts: int = option(16, "Images in which codes are exchanged.", at_least=1)
    consistency_codes: int = option(24, "Codes that are compared in each.", at_least=1)
    diffusion_steps: int = option(500, "Training steps of the diffusability measure.", at_least=1)
    diffusion_train_split: str = option("train", "Split that it trains on.")

    def __post_init__(self):
        check_values(self)
        if unknown := sorted(set(self.measures) - set(GROUPS)):
            raise ValueError(f"measures={unknown} must be among {', '.join(GROUPS)}.")


class NotApplicable(Exception):
    """Why a group of measures has nothing to say about this model and these images."""


# ---------------------------------------------------------------------------------------------------------------------
# What the measures work on


@dataclass
class FeatureExtractor:
    """
    What Fréchet distances are taken in.

    Args:
        name (`str`): Figures of different names are never compared.
        features (`Callable`): `(B, 3, H, W)` in [-1, 1] to `(B, F)`.
    """

    name: str
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
        return FeatureExtractor("Inception-v3 of torch-fidelity, 2048 features", lambda pixels: network(pixels)[0])
    name = f"LPIPS {perceptual.net}, pooled features of all layers, images enlarged x{perceptual.upscale}"
    return FeatureExtractor(name, lambda pixels: pooled_features(perceptual, pixels))


@dataclass
class Subject:
    """
    A model, images and their latents.

    Args:
        pixels (`Tensor` of shape `(N, 3, H, W)`): Images in [-1, 1].
        latents (`Tensor` of shape `(N, D, h, w)`): As `encode` gives them, not quantized.
        labels (`Tensor` of shape `(N,)`, *optional*): Class numbers.
        diffusion_dataset (`str`): Where the diffusability measure finds images to train on.
    """

    autoencoder: Autoencoder
    pixels: Tensor
    latents: Tensor
    labels: Tensor | None
    perceptual: LPIPS
    extractor: FeatureExtractor
    diffusion_dataset: str
    config: LatentAnalysisConfig

    def __post_init__(self):
        self.mean = self.latents.mean(dim=(0, 2, 3), keepdim=True)
        self.std = float((self.latents - self.mean).square().mean().sqrt())
        self.centred = (self.latents - self.mean) / self.std  # where interpolation happens

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

    def mean_measure(self, values: Tensor, unit: str, better: str | None, protocol: str) -> Measure:
        """The mean over independent rows, NaN ones left out."""
        values = values[values.isfinite()].double()
        if not len(values):
            raise NotApplicable("no image gives a figure")
        found = bootstrap(lambda rows: rows.mean(), values, seed=self.config.seed)
        return Measure(*found, unit=unit, better=better, n=len(values), protocol=protocol)


# ---------------------------------------------------------------------------------------------------------------------
# The groups


def smoothness(subject: Subject) -> dict[str, Measure]:
    config, distance = subject.config, subject.perceptual
    start, end = subject.pairs()
    t = torch.rand(len(start), generator=subject.generator()).to(start.device)
    ways = {"": (subject.decode_centred, config.path_epsilon)}
    if subject.autoencoder.is_discrete:
        ways["_quantized"] = (subject.decode_centred_quantized, 1 / config.path_steps)
    found = {}
    for suffix, (decode, epsilon) in ways.items():
        at = t * (1 - epsilon)

        def length(a: Tensor, b: Tensor, u: Tensor, decode=decode, epsilon=epsilon) -> Tensor:
            return path_length(decode, distance, a, b, u, epsilon)

        what = "quantized on the way" if suffix else "continuous latents"
        found[f"perceptual_path_length{suffix}"] = subject.mean_measure(
            subject.batched(length, start, end, at),
            "LPIPS / ε²",
            "lower",
            f"slerp of centred latents of image pairs, {what}, one t per pair, ε = {epsilon:g}",
        )
        lengths, chords = path_steps(decode, distance, start, end, config.path_steps)
        protocol = f"slerp of centred latents of image pairs, {what}, {config.path_steps} steps, √LPIPS"
        moving = straightness(lengths, chords)
        found[f"path_straightness{suffix}"] = subject.mean_measure(moving, "chord / path length", "higher", protocol)
        found[f"path_jump_share{suffix}"] = subject.mean_measure(
            jump_share(lengths), "share of steps", "lower", f"{protocol}, longer than 3 mean steps"
        )
    return found


def lipschitz(subject: Subject) -> dict[str, Measure]:
    config = subject.config

    def gain(latents: Tensor) -> Tensor:
        quantized = subject.autoencoder.quantize(latents)[0]
        return local_lipschitz(subject.autoencoder.decode, quantized, config.lipschitz_iterations, config.seed)

    gains = subject.batched(gain, subject.latents[: config.lipschitz_images]) * subject.std
    protocol = (
        f"largest singular value of the decoder's Jacobian (L2 norms) at what images are decoded from, "
        f"{config.lipschitz_iterations} power iterations, times the latents' standard deviation"
    )
    return {"lipschitz": subject.mean_measure(gains, "pixel L2 / latent std", "lower", protocol)}


def frechet_measures(subject: Subject, name: str, decoded: Tensor, protocol: str) -> dict[str, Measure]:
    """Distances of `decoded` images from the originals, `NAMEfid` and `NAMEkid`."""
    real, fake = (subject.batched(subject.extractor.features, images) for images in (subject.pixels, decoded))
    dimension = min(real.shape[1], max(4, 2 ** int(math.log2(len(real) / 8))))

    def distance(a: Tensor, b: Tensor) -> float:
        moments = []
        for features in (a, b):
            moments.append(FeatureMoments(features.shape[1]))
            moments[-1].update(features)
        return max(0.0, frechet_distance(*moments))

    frechet = bootstrap(
        distance,
        project(real, dimension),
        project(fake, dimension),
        resamples=200,
        seed=subject.config.seed,
        recentre=True,
    )
    kernel = bootstrap(kernel_distance, real, fake, resamples=200, seed=subject.config.seed, recentre=True)
    features = f"{protocol}; {subject.extractor.name}"
    return {
        f"{name}fid": Measure(
            *frechet, "Fréchet distance", "lower", len(real), f"{features}; {dimension} random projections"
        ),
        f"{name}kid": Measure(*kernel, "MMD²", "lower", len(real), f"{features}; unbiased, cubic kernel"),
    }


def holes(subject: Subject) -> dict[str, Measure]:
    rebuilt = subject.batched(subject.decode_quantized, subject.latents)
    middle = subject.decode_centred_quantized(neighbour_midpoints(subject.centred))
    between = "nearest-neighbour latents of the set, centred, slerp at ½, quantized where the model has codes, decoded"
    return frechet_measures(subject, "r", rebuilt, "reconstructions") | frechet_measures(subject, "i", middle, between)


def robustness(subject: Subject) -> dict[str, Measure]:
    config, generator = subject.config, subject.generator()
    codes = subject.codes
    perturbed = replace_tokens(codes, subject.codebooks(), config.replaced_share, config.replaced_neighbours, generator)
    before, after = subject.decode_indices(codes), subject.decode_indices(perturbed)
    replaced = (
        f"{config.replaced_share:.0%} of the tokens, each by one of its {config.replaced_neighbours} nearest codes"
    )
    found = {
        "token_robustness": subject.mean_measure(
            subject.batched(subject.perceptual, after, before), "LPIPS", "lower", f"{replaced}, against before"
        )
    }
    found |= frechet_measures(subject, "p", after, f"replaced {replaced}")
    noisy = subject.batched(subject.encode_indices, level_noise(subject.pixels, generator))
    factor = subject.autoencoder.downsample_factor
    found["index_stability_noise"] = subject.mean_measure(
        unchanged_share(codes, noisy), "share of codes", "higher", "every channel of every pixel ±1/255 at random"
    )
    for name, shift, what in (("pixel", 1, "one pixel"), ("stride", factor, "f pixels, codes shifted back")):
        if name == "pixel" and factor == 1:
            continue  # the same thing

        def stays(pixels: Tensor, shift=shift) -> Tensor:
            return shift_stability(subject.encode_indices, pixels, shift, factor)

        found[f"index_stability_{name}_shift"] = subject.mean_measure(
            subject.batched(stays, subject.pixels), "share of codes", "higher", f"crops moved by {what}, right and down"
        )
    return found


def codes(subject: Subject) -> dict[str, Measure]:
    config, generator = subject.config, subject.generator()
    indices, (codebook, *_) = subject.codes, subject.codebooks()
    used = indices[..., 0].unique()
    if len(used) < 4:
        raise NotApplicable(f"only {len(used)} codes are used")
    ways: dict[str, tuple[Distance, str]] = {
        "": (subject.perceptual, "LPIPS"),
        "_pixels": (PixelDistance(), "squared pixel difference"),
    }
    correlations: dict[str, list[float]] = {suffix: [] for suffix in ways}
    for context in indices[: config.consistency_contexts].split(1):
        row, column = (int(torch.randint(side, (), generator=generator)) for side in context.shape[1:3])
        drawn = used[torch.randperm(len(used), generator=generator)[: config.consistency_codes].to(used.device)]
        images = subject.decode_indices(exchange_code(context, row, column, drawn))
        for suffix, (distance, _) in ways.items():
            correlations[suffix].append(neighbour_consistency(distance, images, codebook[drawn]))
    protocol = (
        f"pairs of {config.consistency_codes} used codes at one position of an image, distance in the codebook and"
    )
    return {
        f"code_neighbour_consistency{suffix}": subject.mean_measure(
            torch.tensor(correlations[suffix]), "Spearman's ρ", "higher", f"{protocol} {what} of the images"
        )
        for suffix, (_, what) in ways.items()
    }


def equivariance(subject: Subject) -> dict[str, Measure]:
    found = {}
    side = subject.pixels.shape[2]
    for name, transform in TRANSFORMS.items():
        if name == "scale" and side % (2 * subject.autoencoder.downsample_factor):
            continue

        def error(pixels: Tensor, latents: Tensor, transform=transform) -> Tensor:
            return equivariance_error(subject.encode, pixels, latents, transform, subject.std)

        def image_error(pixels: Tensor, latents: Tensor, transform=transform) -> Tensor:
            return subject.perceptual(subject.decode_quantized(transform(latents)), transform(pixels))

        what = {"scale": "half size", "flip": "mirrored", "rotation": "turned by 90°"}[name]
        found[f"equivariance_{name}"] = subject.mean_measure(
            subject.batched(error, subject.pixels, subject.latents), "latent std", "lower", f"E(Tx) - T E(x), T: {what}"
        )
        found[f"equivariance_{name}_reconstruction"] = subject.mean_measure(
            subject.batched(image_error, subject.pixels, subject.latents), "LPIPS", "lower", f"D(T E(x)), Tx, T: {what}"
        )
    found["reconstruction"] = subject.mean_measure(
        subject.batched(subject.perceptual, subject.batched(subject.decode_quantized, subject.latents), subject.pixels),
        "LPIPS", "lower", "D(E(x)), x: what the equivariance of reconstructions is to be read against",
    )  # fmt: skip
    return found


def spectrum(subject: Subject) -> dict[str, Measure]:
    side = subject.latents.shape[2]
    if side < 8:
        raise NotApplicable(f"latents of {side}x{side} positions have no spectrum to speak of")
    shrunk = torch.nn.functional.interpolate(subject.pixels, (side, side), mode="area")
    found = {}
    for name, maps, what in (("latent", subject.latents, "latents"), ("image", shrunk, "images shrunk to the latents")):
        share, slope = high_frequency_share(maps), spectral_slope(maps)
        better = "lower" if name == "latent" else None
        found[f"{name}_high_frequency_share"] = subject.mean_measure(
            share, "share of energy", better, f"{what}, |f| > ¼"
        )
        found[f"{name}_spectral_slope"] = subject.mean_measure(slope, "log power / log |f|", better, f"{what}, rings")
    return found


def probe(subject: Subject) -> dict[str, Measure]:
    if subject.labels is None:
        raise NotApplicable("the dataset has no label column, or several: --label_column")
    counts = subject.labels.bincount()
    kept = (counts >= 5)[subject.labels]
    labels = subject.labels[kept].unique(return_inverse=True)[1]
    if not len(labels) or labels.max() == 0:
        raise NotApplicable("there are no two classes with five images each: more --max_samples")
    latents = subject.centred[kept]
    forms = {"": ("mean and standard deviation over positions", torch.cat([latents.mean(dim=(2, 3)),
             latents.std(dim=(2, 3))], dim=1)), "_flattened": ("all positions", latents.flatten(1))}  # fmt: skip
    protocol = f"logistic regression, 5 folds, {int(labels.max()) + 1} classes with 5 images or more, features:"
    found = {
        f"linear_probe{suffix}": subject.mean_measure(
            linear_probe(features, labels, seed=subject.config.seed), "accuracy", "higher", f"{protocol} {what}"
        )
        for suffix, (what, features) in forms.items()
    }
    largest = (labels == labels.bincount().argmax()).double()
    found["linear_probe_chance"] = subject.mean_measure(largest, "accuracy", None, "always the most frequent class")
    return found


def dimension(subject: Subject) -> dict[str, Measure]:
    vectors = subject.centred.flatten(2).double()  # (N, D, hw)
    moments = vectors @ vectors.transpose(1, 2) / vectors.shape[2]
    means = vectors.mean(dim=2)

    def ratio(moments: Tensor, means: Tensor) -> float:
        mean = means.mean(dim=0)
        return participation_ratio(moments.mean(dim=0) - torch.outer(mean, mean))

    found = bootstrap(ratio, moments, means, resamples=200, seed=subject.config.seed, recentre=True)
    protocol = "participation ratio of the channels' covariance over images and positions"
    return {"effective_dimension": Measure(*found, "dimensions", "higher", len(moments), protocol)}


def diffusability(subject: Subject) -> dict[str, Measure]:
    if not subject.autoencoder.is_discrete:
        raise NotApplicable("only VQGANModels have a diffusion trainer here")
    config = subject.config
    channels = [64, 128] if subject.latents.shape[2] % 2 == 0 else [64]
    pipeline = train_small_diffusion(subject, channels)
    losses = heldout_denoising_losses(subject, pipeline)
    generator, sizes = subject.generator(), [len(part) for part in subject.pixels.split(config.batch_size)]
    samples = [
        pipeline(size, num_inference_steps=30, generator=generator, output_type="pt").images * 2 - 1 for size in sizes
    ]
    budget = f"UNet of {channels} channels, {config.diffusion_steps} steps of 32 latents, flow matching"
    found = frechet_measures(subject, "g", torch.cat(samples).float(), f"samples in 30 Euler steps; {budget}")
    protocol = f"8 noise levels, images of the analysis; {budget} on the split {config.diffusion_train_split!r}"
    found["diffusion_loss"] = subject.mean_measure(losses, "mean squared error", "lower", protocol)
    return found


def train_small_diffusion(subject: Subject, channels: list[int]) -> DiffusionPipeline:
    """A small UNet, trained for `config.diffusion_steps` steps on latents of zero mean and unit variance."""
    config = subject.config
    with tempfile.TemporaryDirectory() as folder:
        # Whatever the model's own factors say, so that models compare.
        model = copy.deepcopy(subject.autoencoder.model)
        model.config.scaling_factor = 1 / float(subject.latents.std())
        model.config.shift_factor = float(subject.latents.mean())
        model.save_pretrained(f"{folder}/model")
        settings = LatentDiffusionConfig(
            vqgan=f"{folder}/model",
            output_dir=f"{folder}/run",
            dataset_name=subject.diffusion_dataset,
            dataset_config_name=config.dataset_config_name,
            dataset_revision=config.dataset_revision,
            cache_dir=config.cache_dir,
            train_split=config.diffusion_train_split,
            image_column=config.image_column,
            resolution=subject.pixels.shape[2],
            resize=config.resize,
            block_out_channels=channels,
            layers_per_block=1,
            attention_levels=1,
            attention_head_dim=32,
            train_batch_size=32,
            learning_rate=1e-3,
            lr_warmup_steps=min(50, config.diffusion_steps),
            ema_decay=0.99,
            max_train_steps=config.diffusion_steps,
            sample_steps=config.diffusion_steps,
            sample_images=1,  # a picture that nobody will see
            sample_inference_steps=1,
            checkpointing_steps=config.diffusion_steps,
            seed=config.seed,
        )
        with torch.enable_grad():
            train_latent_diffusion(settings)
        pipeline = DiffusionPipeline.from_pretrained(settings.output_dir).to(subject.latents.device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def heldout_denoising_losses(subject: Subject, pipeline: DiffusionPipeline, levels: int = 8) -> Tensor:
    """Flow-matching loss of every image at `levels` evenly spread noise levels, `(N,)`."""
    generator, losses = subject.generator(), []
    for latents in subject.latents.split(1):
        repeated = normalize_latents(pipeline.vqvae, latents).expand(levels, *latents.shape[1:])
        noise = torch.randn(repeated.shape, generator=generator).to(repeated)
        at = ((torch.arange(levels) + 0.5) / levels).to(repeated.device)
        losses.append(denoising_loss(pipeline.denoiser, pipeline.scheduler, repeated, noise, at, None))
    return torch.stack(losses)


GROUPS: dict[str, Callable[[Subject], dict[str, Measure]]] = {
    "smoothness": smoothness,
    "lipschitz": lipschitz,
    "holes": holes,
    "robustness": robustness,
    "codes": codes,
    "equivariance": equivariance,
    "spectrum": spectrum,
    "probe": probe,
    "dimension": dimension,
    "diffusability": diffusability,
}
SLOW = ("diffusability",)


# ---------------------------------------------------------------------------------------------------------------------
# Model and images


def load_images(name: str, config: LatentAnalysisConfig, resolution: int) -> tuple[Tensor, Tensor | None, str]:
    """
    Returns:
        `(Tensor, Tensor or None, str)`: Images `(N, 3, resolution, resolution)` in [-1, 1]; their class numbers `(N,)`,
        if there is a label column; the split they are from.

    Raises:
        ValueError: for a split or column that is not there, and for too few readable images.
    """
    splits = load_splits(name, config.dataset_config_name, cache_dir=config.cache_dir, revision=config.dataset_revision)
    split = config.split or next((known for known in ("validation", "test", "train") if known in splits), None)
    if split not in splits:
        raise ValueError(f"dataset {name!r} has no split {split!r}; it has {', '.join(splits)}.")
    rows = splits[split].shuffle(seed=config.seed)  # many datasets are sorted by class
    rows = rows.select(range(min(config.max_samples, len(rows))))
    column = find_image_column(rows, name, config.image_column)
    images = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    transform = ImageTransform(resolution, config.resize, center_crop=True, random_flip=False)
    readable = ValidationImages(images.rename_columns({column: "image"}), transform, whole=False, size_divisor=1)
    if len(readable) < 8:
        raise ValueError(f"dataset {name!r}, split {split!r}: {len(readable)} readable images; 8 or more are needed.")
    labels = read_labels(rows, name, config.label_column)
    pixels = torch.stack([readable[number] for number in range(len(readable))])
    return pixels, None if labels is None else labels[readable.readable], split


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


def prepare(model_name: str, dataset_name: str, config: LatentAnalysisConfig) -> tuple[Subject, dict]:
    """The subject of all measures, and the settings that figures must share to be compared."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    autoencoder = load_autoencoder(model_name).float().requires_grad_(False).to(device)
    if not autoencoder.has_decoder:
        raise ValueError(f"{model_name} has no decoder: there is nothing to see in its latent space.")
    factor, side = autoencoder.downsample_factor, config.resolution or autoencoder.model.config.sample_size
    if side % factor or side < 2 * factor:
        raise ValueError(
            f"resolution={side} must be a multiple of f={factor}, the downsampling factor, and 2f or more."
        )
    pixels, labels, split = load_images(dataset_name, config, side)
    # Enlarged so far that half-size images, too, are large enough for the network.
    upscale = max(1, math.ceil(NETWORKS[config.perceptual_net].min_side / (side // 2)))
    perceptual = LPIPS(config.perceptual_net, config.perceptual_weights_path, upscale).to(device)
    pixels = pixels.to(device)
    latents = torch.cat([autoencoder.encode(part).float() for part in pixels.split(config.batch_size)])
    if latents.std() == 0:
        raise ValueError(f"{model_name} gives all images the same latents: there is no space to measure.")
    subject = Subject(
        autoencoder,
        pixels,
        latents,
        None if labels is None else labels.to(device),
        perceptual,
        build_extractor(config, perceptual, device),
        dataset_name,
        config,
    )
    settings = {
        "dataset": dataset_name,
        "split": split,
        "images": len(pixels),
        "resolution": side,
        "resize": config.resize,
        "seed": config.seed,
        "perceptual_distance": f"LPIPS {config.perceptual_net}, images enlarged x{upscale}",
        "feature_extractor": subject.extractor.name,
    }
    return subject, settings
