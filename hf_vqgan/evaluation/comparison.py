"""Autoencoders, and JPEG and WebP at their bits, on the same images: figures that say how they were made.

Every figure is taken per image and kept in a table with a row per image, in float64, which the processes add up at the
end: neither their number nor the batch size changes a mean. Fréchet distances come from sums over all images.
"""

import hashlib
import json
import logging
import re
import statistics
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as tvF
from tqdm.auto import tqdm

from ..data.datasets import (
    ImageTransform,
    UnreadableImage,
    decode_image,
    find_image_column,
    load_splits,
    row_of,
    to_pixel_values,
)
from ..files.documents import write_text
from ..files.options import check_values, option
from ..generation.encoded_dataset import weights_sha256
from ..hub.model_card import EVALUATION_FIGURES, update_model_card
from ..losses.image_losses import LPIPS
from ..losses.lpips_weights import NETWORKS
from ..measurement.frechet import (
    CLASSES,
    FeatureMoments,
    InceptionFeatures,
    frechet_distance,
    inception_score,
    to_bytes,
)
from ..measurement.metrics import mean_perplexity, number_codes, pixel_figures, sum_over_processes
from ..measurement.pictures import draw_comparison
from ..training.setup import share_cpu_threads
from .autoencoders import Autoencoder, load_autoencoder
from .image_codecs import CODECS, encode_near

logger = logging.getLogger(__name__)

SCORE_PARTS = 10  # of the Inception score
LIBRARIES = ("hf_vqgan", "torch", "torchvision", "torchmetrics", "lpips", "torch-fidelity", "transformers", "diffusers",
             "pillow")  # fmt: skip


@dataclass
class EvaluationConfig:
    """How models are evaluated. Every field is a flag of `hf-vqgan evaluate`."""

    output_dir: str = option(
        "runs/evaluation", "Folder for evaluation.json, evaluation.md and comparison.png.", nonempty=True
    )
    dataset_config_name: str | None = option(None, "Configuration of the dataset.")
    dataset_revision: str | None = option(None, "Branch, tag or commit of a Hub dataset.")
    split: str | None = option(None, "Split to evaluate on. Default: `validation`, else `test`, else the only one.")
    image_column: str | None = option(None, "Column with the images. Default: the only image column.")
    cache_dir: str | None = option(None, "Where `datasets` keeps what it downloads.")
    max_samples: int | None = option(None, "Only the first so many images. Default: all.", at_least=1)
    resolution: int | None = option(
        None, "Side of the central square. Default: the first model's sample_size.", at_least=1
    )
    resize: int | None = option(
        None, "Shorter side before cropping. Default: resolution. 0: keep the image's size.", at_least=0
    )
    batch_size: int = option(16, "Images per forward pass.", at_least=1)
    mixed_precision: str = option("no", "Autocast of the models, not of the measures.", choices=("no", "bf16", "fp16"))
    lpips: list[str] = option(["alex", "vgg"], "Networks of LPIPS.", choices=tuple(NETWORKS))
    alex_weights_path: str | None = option(None, "AlexNet for LPIPS. Default: found as docs/evaluation.md says.")
    vgg_weights_path: str | None = option(None, "VGG16 for LPIPS. Default: found as docs/evaluation.md says.")
    inception: bool = option(True, "rFID and rIS, where Inception's weights can be had.")
    inception_weights_path: str | None = option(None, "torch-fidelity's Inception weights. Default: cache or download.")
    anchors: list[str] = option(list(CODECS), "Codecs at the bits of each model.", choices=("none", *CODECS))
    pictures: int = option(6, "Rows of comparison.png.", at_least=0)
    dataloader_num_workers: int = option(0, "Processes that load images, per process.", at_least=0)
    cpu_threads: int | None = option(None, "Threads per process on CPU. Default: the cores shared evenly.", at_least=1)
    update_model_card: bool = option(False, "Write each model's figures into its folder: README.md, evaluation.json.")

    def __post_init__(self):
        check_values(self)


@dataclass
class EvaluationReport:
    """
    Figures of one column of the comparison. What cannot be had is `None`.

    Args:
        name (`str`): The model as it was named, or codec and bits.
        kind (`str`): Class of the model, or `"JPEG"`, `"WebP"`.
        num_images (`int`): How many images.
        psnr (`float`): dB, on pixels clamped and mapped to [0, 1]; mean over images.
        ssim (`float`): On the same pixels; mean over images.
        l1 (`float`): Mean absolute error in [-1, 1] pixels.
        lpips_alex, lpips_vgg (`float`, *optional*): LPIPS v0.1, mean over images.
        rfid (`float`, *optional*): Fréchet distance between the originals' Inception features and the reconstructions'.
        ris, ris_std (`float`, *optional*): Inception score of the reconstructions, mean and deviation over ten parts.
        perplexity (`float`, *optional*): exp(entropy) of the codes of all images; mean over codebooks.
        usage (`float`, *optional*): Share of codes hit at least once by these images.
        bits_per_pixel (`float`, *optional*): n·log2(K)/f² without entropy coding, or what the codec took.
        standard_errors (`dict`): Of the means over images: deviation / sqrt(N).
        details (`dict`): What the model is, or how the codec was driven.
        speed (`dict`): Images per second and peak memory, where they were measured; never the same twice.
    """

    name: str
    kind: str
    num_images: int
    psnr: float
    ssim: float
    l1: float
    lpips_alex: float | None = None
    lpips_vgg: float | None = None
    rfid: float | None = None
    ris: float | None = None
    ris_std: float | None = None
    perplexity: float | None = None
    usage: float | None = None
    bits_per_pixel: float | None = None
    standard_errors: dict[str, float] = field(default_factory=dict)
    details: dict = field(default_factory=dict)
    speed: dict[str, float] = field(default_factory=dict)

    def figures(self) -> dict[str, float]:
        """The scalars that could be had, by name; `lpips` is the one with AlexNet, as in a run's metrics.json."""
        scalars = {name: value for name, value in asdict(self).items() if isinstance(value, (int, float))}
        return scalars | ({"lpips": self.lpips_alex} if self.lpips_alex is not None else {})


class EvaluationImages(torch.utils.data.Dataset):
    """
    The central squares of a split's images, with where they come from. `split_note` warns of a split that was not
    asked for and may be what models were trained on.

    Items are dicts: `item` (its number), `pixels` (uint8 `(3, resolution, resolution)`), `enlarged`; or `item` and
    `error`, if the image cannot be read.

    Raises:
        ValueError: if there is no such split, or it is empty, or it has no image column.
    """

    def __init__(self, dataset_name: str, resolution: int, config: EvaluationConfig):
        splits = load_splits(
            dataset_name, config.dataset_config_name, cache_dir=config.cache_dir, revision=config.dataset_revision
        )
        names = [config.split] if config.split else ["validation", "test", *(splits if len(splits) == 1 else ())]
        self.split = next((name for name in names if name in splits), None)
        if self.split is None:
            raise ValueError(f"dataset {dataset_name!r} has no split {names[0]!r}; it has {', '.join(splits)}.")
        self.split_note = None
        if config.split is None and self.split not in ("validation", "test"):
            self.split_note = (
                f"dataset {dataset_name!r} has no split for validation or test: these are images of {self.split!r}, "
                "its only split. Figures of models that were trained on them flatter; compare models that were not."
            )
        images = splits[self.split]
        if len(images) == 0:
            raise ValueError(f"dataset {dataset_name!r}: split {self.split!r} is empty.")
        self.name, self.commit = dataset_name, _commit(images)
        self.column = find_image_column(images, dataset_name, config.image_column)
        images = images.select_columns([self.column]).cast_column(self.column, datasets.Image(decode=False))
        self.images = images.select(range(min(len(images), config.max_samples or len(images))))
        self.transform = ImageTransform(resolution, config.resize, center_crop=True, random_flip=False)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: int) -> dict:
        try:
            image = decode_image(self.images[item][self.column], row_of(self.images, item))
        except UnreadableImage as error:
            return {"item": item, "error": str(error)}
        resolution = self.transform.resolution
        pixels = tvF.center_crop(self.transform.scale(image), [resolution, resolution])
        return {"item": item, "pixels": pixels, "enlarged": min(image.size) < resolution}


def _commit(images: datasets.Dataset) -> str | None:
    """The commit of a Hub dataset, as the names of its files have it."""
    found = (re.search(r"@([0-9a-f]{40})/", name) for name in images.info.download_checksums or ())
    return next((match[1] for match in found if match), None)


class Measures:
    """
    The networks that judge: LPIPS and Inception, as far as they can be had. `skipped` says which cannot, and why.

    Raises:
        ValueError, FileNotFoundError: for a weights file that was named and is not there or holds something else.
    """

    def __init__(self, config: EvaluationConfig, resolution: int, device: torch.device):
        self.skipped: dict[str, str] = {}
        self.lpips: dict[str, LPIPS] = {}
        for net in dict.fromkeys(config.lpips):
            path = getattr(config, f"{net}_weights_path")
            if resolution < NETWORKS[net].min_side:
                self.skipped[f"lpips_{net}"] = f"needs images of {NETWORKS[net].min_side} pixels, not {resolution}."
            elif (network := self._load(f"lpips_{net}", path, lambda net=net, path=path: LPIPS(net, path))) is not None:
                self.lpips[net] = network.to(device)
        self.inception: InceptionFeatures | None = None
        if config.inception:
            path = config.inception_weights_path
            network = self._load("rfid, ris", path, lambda: InceptionFeatures(path))
            self.inception = None if network is None else network.to(device)

    def _load(self, name: str, path: str | None, load: Callable):
        try:
            return load()
        except FileNotFoundError as error:
            if path is not None:
                raise
            self.skipped[name] = str(error)
            return None

    @property
    def names(self) -> list[str]:
        """Figures that `compare` gives per image."""
        return ["psnr", "ssim", "l1", *(f"lpips_{net}" for net in self.lpips)]

    def features(self, pixels: Tensor) -> dict[str, list[Tensor]]:
        """LPIPS features of `(B, 3, H, W)` in [-1, 1] per network, so that each original goes through once."""
        return {net: network.features(pixels) for net, network in self.lpips.items()}

    def compare(self, sample: Tensor, pixels: Tensor, features: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        """Figures `(B,)` of reconstructions against images, both in [-1, 1]; `features` are those of the images."""
        figures = pixel_figures(sample, pixels)
        for net, network in self.lpips.items():
            figures[f"lpips_{net}"] = network.distance(network.features(sample), features[net])
        return figures


class Tally:
    """
    What one set of images, originals or reconstructions, comes to: this process's share until `gather`.

    Args:
        names (`list[str]`): Figures per image.
        num_images (`int`): N, of all processes, readable or not.
        shown (`list[int]`): Numbers of the images that pictures are kept of, and `side`, their side.
        with_inception (`bool`): Whether Inception's features will be counted.
        histogram (`int`): How many codes there are to count.
    """

    def __init__(
        self,
        names: list[str],
        num_images: int,
        shown: list[int],
        side: int,
        with_inception: bool,
        histogram: int = 0,
    ):
        self.names, self.shown = names, shown
        self.table = torch.zeros(num_images, len(names), dtype=torch.float64)
        self.counts = torch.zeros(histogram, dtype=torch.int64)
        self.pictures = torch.zeros(len(shown), 3, side, side, dtype=torch.uint8)
        self.moments = FeatureMoments() if with_inception else None
        self.logits = torch.zeros(num_images if with_inception else 0, CLASSES)

    def add(self, items: list[int], figures: dict[str, Tensor], pixels: Tensor, inception: InceptionFeatures | None):
        """Images number `items`, `(B, 3, H, W)` in [-1, 1], and their figures `(B,)`."""
        if self.names:
            self.table[items] = torch.stack([figures[name].cpu().double() for name in self.names], dim=1)
        for number, item in enumerate(items):
            if item in self.shown:
                self.pictures[self.shown.index(item)] = to_bytes(pixels[number]).cpu()
        if inception is not None:
            features, logits = inception(pixels)
            self.moments.update(features)
            self.logits[items] = logits.cpu()

    def gather(self, device: torch.device) -> None:
        """Every process's share becomes that of all."""
        for name in ("table", "counts", "pictures", "logits"):
            setattr(self, name, sum_over_processes(getattr(self, name), device))
        if self.moments is not None:
            self.moments = self.moments.over_processes(device)


class ModelColumn:
    """A model in the comparison."""

    def __init__(self, autoencoder: Autoencoder, autocast: Callable[[], AbstractContextManager]):
        self.autoencoder, self.autocast = autoencoder, autocast
        self.name, self.kind = autoencoder.name, type(autoencoder.model).__name__
        self.histogram = (autoencoder.num_codebooks or 0) * (autoencoder.num_codes or 0)
        self.extra_names: list[str] = []
        self.speed: dict[str, float] = {}
        self.tally: Tally

    def reconstruct(self, pixels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Images `(B, 3, H, W)` in [-1, 1] to reconstructions in the same range, float32, and `extra_names` of each."""
        with self.autocast():
            quantized, indices = self.autoencoder.quantize(self.autoencoder.encode(pixels))
            sample = self.autoencoder.decode(quantized)
        if indices is not None:
            codes, codebooks = self.autoencoder.num_codes, self.autoencoder.num_codebooks
            numbers = number_codes(indices, codes, codebooks).cpu()
            self.tally.counts += torch.bincount(numbers, minlength=self.histogram)
        return sample.float().clamp(-1, 1), {}

    def measure_speed(self, pixels: Tensor, repeats: int = 5) -> None:
        """Median rates of encoding (to codes) and decoding one batch, and the memory that each takes at its peak."""
        with self.autocast():
            quantized = self._encode(pixels)
            for name, run in (("encode", lambda: self._encode(pixels)), ("decode", lambda: self._decode(quantized))):
                with peak_memory(pixels.device) as peak:  # warms up, too
                    run()
                self.speed[f"{name}_peak_memory_mb"] = peak[0] / 2**20
                seconds = [_seconds(run, pixels.device) for _ in range(repeats)]
                self.speed[f"{name}_images_per_second"] = len(pixels) / statistics.median(seconds)

    def _encode(self, pixels: Tensor) -> Tensor:
        return self.autoencoder.quantize(self.autoencoder.encode(pixels))[0]

    def _decode(self, quantized: Tensor) -> Tensor:
        return self.autoencoder.decode(quantized)

    def figures(self, readable: Tensor) -> dict:
        """What only a model has, for its report."""
        model = self.autoencoder
        found = {
            "bits_per_pixel": model.bits_per_pixel,
            "details": {
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "dtype": str(model.model.dtype).removeprefix("torch."),
                "downsample_factor": model.downsample_factor,
                "latent_channels": model.latent_channels,
                "num_codes": model.num_codes,
                "num_codebooks": model.num_codebooks,
                "weights_sha256": weights_sha256(model.model),
            },
            "speed": self.speed,
        }
        if model.is_discrete:
            found["perplexity"] = mean_perplexity(self.tally.counts, model.num_codebooks)
            found["usage"] = float((self.tally.counts > 0).double().mean())
        return found


class CodecColumn:
    """JPEG or WebP, each image at about `bits_per_pixel`."""

    histogram = 0
    extra_names = ["bits_per_pixel", "quality", "shrunk", "over_budget"]

    def __init__(self, codec: str, bits_per_pixel: float):
        self.codec, self.budget = codec, bits_per_pixel
        self.name, self.kind = f"{CODECS[codec]} at {bits_per_pixel:.4g} bits per pixel", CODECS[codec]
        self.tally: Tally

    def reconstruct(self, pixels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        area = pixels.shape[2] * pixels.shape[3]
        coded = [
            encode_near(tvF.to_pil_image(image), self.codec, self.budget * area) for image in to_bytes(pixels).cpu()
        ]
        rows = [(one.bits / area, one.quality, one.shrink > 1, one.bits > 1.1 * self.budget * area) for one in coded]
        sample = torch.stack([to_pixel_values(tvF.pil_to_tensor(one.image)) for one in coded])
        figures = torch.tensor(rows, dtype=torch.float64).unbind(dim=1)
        return sample.to(pixels.device), dict(zip(self.extra_names, figures, strict=True))

    def figures(self, readable: Tensor) -> dict:
        means = self.tally.table[readable][:, -len(self.extra_names) :].mean(dim=0).tolist()
        bits, quality, shrunk, over_budget = means
        return {
            "bits_per_pixel": bits,
            "details": {
                "budget_bits_per_pixel": self.budget,
                "mean_quality": quality,
                "shrunk_share": shrunk,
                "over_budget_share": over_budget,
            },
        }


def make_report(
    column: ModelColumn | CodecColumn, originals: Tally, readable: Tensor, measures: Measures
) -> EvaluationReport:
    """The report of a column whose tally has been gathered."""
    tally = column.tally
    rows = tally.table[readable][:, : len(measures.names)]
    count = len(rows)
    errors = rows.std(dim=0) / count**0.5 if count > 1 else rows.new_full((rows.shape[1],), float("nan"))
    report = EvaluationReport(
        name=column.name,
        kind=column.kind,
        num_images=count,
        standard_errors=dict(zip(measures.names, errors.tolist(), strict=True)) if count > 1 else {},
        **dict(zip(measures.names, rows.mean(dim=0).tolist(), strict=True)),
        **column.figures(readable),
    )
    if tally.moments is not None and count >= SCORE_PARTS:
        report.rfid = frechet_distance(originals.moments, tally.moments)
        report.ris, report.ris_std = inception_score(tally.logits[readable], SCORE_PARTS)
    return report


def evaluate(model_names: list[str], dataset_name: str, config: EvaluationConfig) -> dict:
    """
    Measure reconstructions of `dataset_name` by every model, and by the anchors at the models' bits.

    Writes evaluation.json, evaluation.md and comparison.png to `config.output_dir`. Any number of processes gives the
    same figures.

    Args:
        model_names (`list[str]`): As [`load_autoencoder`] takes them.

    Returns:
        `dict`: What evaluation.json says.

    Raises:
        ValueError, FileNotFoundError, OSError: for a model or dataset that is not there or does not fit.
    """
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    share_cpu_threads(config, accelerator)
    device = accelerator.device
    with accelerator.main_process_first():  # one process fills the caches, the others read them
        models = [load_autoencoder(name).to(device) for name in model_names]
        resolution = models[0].model.config.sample_size if config.resolution is None else config.resolution
        check_request(models, resolution, config)
        images = EvaluationImages(dataset_name, resolution, config)
        measures = Measures(config, resolution, device)
    if images.split_note and accelerator.is_main_process:
        logger.warning("%s", images.split_note)
    columns: list[ModelColumn | CodecColumn] = [ModelColumn(model, accelerator.autocast) for model in models]
    budgets = dict.fromkeys(model.bits_per_pixel for model in models if model.is_discrete)
    codecs = [codec for codec in dict.fromkeys(config.anchors) if codec != "none"]
    columns += [CodecColumn(codec, bits) for bits in budgets for codec in codecs]
    with torch.no_grad(), full_precision():
        originals = tally_images(columns, images, measures, accelerator, config)
    readable = originals.table[:, 0] > 0
    if measures.inception is not None and readable.sum() < SCORE_PARTS:
        measures.skipped["rfid, ris"] = f"they need {SCORE_PARTS} images, and there are {int(readable.sum())}."
    reports = [make_report(column, originals, readable, measures) for column in columns]
    result = reports[0].figures() | {
        "protocol": describe_protocol(images, originals, measures, accelerator, config),
        "skipped": measures.skipped,
        "models": [asdict(report) for report in reports[: len(models)]],
        "anchors": [asdict(report) for report in reports[len(models) :]],
    }
    if accelerator.is_main_process:
        kept = readable[originals.shown]
        pictures = {"original": originals.pictures[kept]} | {
            title: column.tally.pictures[kept] for title, column in zip(titles(columns), columns, strict=True)
        }
        write_results(result, pictures, Path(config.output_dir))
        if config.update_model_card:
            for report in reports[: len(models)]:
                write_model_card(report, result)
    accelerator.wait_for_everyone()
    return result


def check_request(models: list[Autoencoder], resolution: int, config: EvaluationConfig) -> None:
    """Raises ValueError, before anything is computed, if a model cannot reconstruct such images."""
    for model in models:
        if not model.has_decoder:
            raise ValueError(f"{model.name}: this checkpoint holds no decoder, so there is nothing to reconstruct.")
        if model.model.config.in_channels != 3:
            raise ValueError(f"{model.name}: takes {model.model.config.in_channels} channels, not RGB images.")
        if resolution < 1 or resolution % model.downsample_factor:
            raise ValueError(
                f"resolution={resolution} is not a multiple of {model.downsample_factor}, the downsampling factor of "
                f"{model.name}."
            )
        if config.update_model_card and not Path(model.name).is_dir():
            raise ValueError(f"update_model_card: {model.name} is not a local folder, so its card stays as it is.")


def tally_images(
    columns: list[ModelColumn | CodecColumn],
    images: EvaluationImages,
    measures: Measures,
    accelerator: Accelerator,
    config: EvaluationConfig,
) -> Tally:
    """
    Pass all images through all columns, each process its share, and fill the columns' tallies.

    Returns:
        [`Tally`] of the originals, whose figures are `readable`, `enlarged` (0 or 1) and `digest` of the pixels.

    Raises:
        ValueError: if not one image can be read.
    """
    device, side = accelerator.device, images.transform.resolution
    shown = np.linspace(0, len(images) - 1, min(config.pictures, len(images))).astype(int).tolist()
    options = {
        "num_images": len(images),
        "shown": shown,
        "side": side,
        "with_inception": measures.inception is not None,
    }
    originals = Tally(["readable", "enlarged", "digest"], **options)
    for column in columns:
        column.tally = Tally([*measures.names, *column.extra_names], **options, histogram=column.histogram)

    numbers = list(range(len(images)))
    batches = [numbers[start : start + config.batch_size] for start in range(0, len(images), config.batch_size)]
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    loader = DataLoader(images, batch_sampler=mine, num_workers=config.dataloader_num_workers, collate_fn=list)
    timed = False
    for batch in tqdm(loader, desc="evaluate", unit=" batches", disable=not accelerator.is_local_main_process):
        for row in batch:
            if "error" in row:
                logger.warning("left out an unreadable image: %s", row["error"])
        rows = [row for row in batch if "error" not in row]
        if not rows:
            continue
        items = [row["item"] for row in rows]
        pixels = to_pixel_values(torch.stack([row["pixels"] for row in rows]).to(device))
        figures = {
            "readable": torch.ones(len(rows)),
            "enlarged": torch.tensor([float(row["enlarged"]) for row in rows]),
            "digest": torch.tensor([_digest(row["pixels"]) for row in rows], dtype=torch.float64),
        }
        originals.add(items, figures, pixels, measures.inception)
        features = measures.features(pixels)
        for column in columns:
            if not timed and isinstance(column, ModelColumn):
                column.measure_speed(pixels)
            sample, extra = column.reconstruct(pixels)
            column.tally.add(items, measures.compare(sample, pixels, features) | extra, sample, measures.inception)
        timed = True
    for tally in (originals, *(column.tally for column in columns)):
        tally.gather(device)
    if not originals.table[:, 0].any():
        raise ValueError(f"dataset {images.name!r}: not one of {len(images)} images can be read.")
    return originals


def _digest(pixels: Tensor) -> int:
    """52 bits, which float64 holds exactly, of the checksum of an image."""
    return int.from_bytes(hashlib.sha256(pixels.numpy().tobytes()).digest()[:8], "big") >> 12


def _seconds(run: Callable, device: torch.device) -> float:
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


@contextmanager
def full_precision() -> Iterator[None]:
    """Convolutions in true float32: TF32, CUDA's default for them, changes the fourth digit of LPIPS and FID."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


class AliveTensors(TorchDispatchMode):
    """Counts the bytes of tensors that operators make while it is on, until they are freed."""

    def __init__(self):
        super().__init__()
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in before:  # neither a view nor in place
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.bytes -= size


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[int]]:
    """
    Yields a list whose only entry, afterwards, is the peak of bytes allocated inside, beyond what was there before: on
    CUDA by the allocator, elsewhere as the sum of tensors alive, without the scratch memory of operators.
    """
    peak = [0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak[0] = torch.cuda.max_memory_allocated(device) - before
    else:
        with AliveTensors() as alive:
            yield peak
        peak[0] = alive.peak


def describe_protocol(
    images: EvaluationImages, originals: Tally, measures: Measures, accelerator: Accelerator, config: EvaluationConfig
) -> dict:
    """Everything that figures depend on, in the words and numbers that a comparison needs."""
    readable = originals.table[:, 0] > 0
    side, resize = images.transform.resolution, images.transform.resize
    digests = originals.table[readable, 2].numpy().astype("<i8").tobytes()
    return {
        "dataset": images.name,
        "dataset_config": config.dataset_config_name,
        "dataset_commit": images.commit,
        "split": images.split,
        "split_note": images.split_note,
        "num_images": int(readable.sum()),
        "unreadable_images": int((~readable).sum()),
        "enlarged_images": int(originals.table[:, 1].sum()),
        "pixels_sha256": hashlib.sha256(digests).hexdigest(),
        "selection": "all images" if config.max_samples is None else f"the first {config.max_samples} images",
        "resolution": side,
        "resize": f"shorter side to {resize} pixels, bicubic with antialiasing (torchvision, on 8-bit pixels)"
        if resize
        else f"none, except that images with a side below {side} pixels are enlarged (bicubic)",
        "crop": f"central {side}x{side} pixels",
        "reference": "the same crops: every figure compares a reconstruction, or the set of them, with its originals",
        "psnr": "data range 1 on pixels clamped and mapped to [0, 1], not rounded to 8 bits; mean over images; at most "
        "100 dB",
        "ssim": "data range 1 on the same pixels, gaussian windows of 11 pixels, sigma 1.5, that lie inside the image, "
        "K1 0.01, K2 0.03, mean over channels, windows and images (equal to scikit-image's)",
        "l1": "mean absolute error of pixels in [-1, 1]",
        "lpips": "v0.1, linear heads of the lpips package, pixels in [-1, 1] at this resolution; mean over images",
        "rfid": "2048 features of torch-fidelity's Inception (pixels rounded to 8 bits, its own resizing to 299), "
        "unbiased covariances; biased upwards for few images, so compare only at the same number of them",
        "ris": f"Inception score of the reconstructions in {SCORE_PARTS} parts, shuffled with seed 2020",
        "perplexity": "exp of the entropy of the histogram of codes over all images; mean over codebooks",
        "usage": "share of codes hit at least once by these images",
        "bits_per_pixel": "models: codes per position x log2(codes) / f^2, no entropy coding; codecs: as below",
        "codecs": "per image the quality whose size is closest to the model's bits (bisection); JPEG counts its scan, "
        "with standard tables and without headers, WebP its file without 20 bytes of container; images that are too "
        "large at the lowest quality are halved (Lanczos) before coding until they fit or have sides below 16, and "
        "enlarged (bicubic); over_budget: more than 1.1 times the bits",
        "speed": f"one batch of at most {config.batch_size} images in one process, median of 5 after a warm-up; peak "
        "memory beyond weights and input: on CUDA the allocator's, on CPU tensors alive at once",
        "standard_errors": "deviation over images / sqrt(number of images)",
        "mixed_precision": config.mixed_precision,
        "batch_size": config.batch_size,
        "processes": accelerator.num_processes,
        "device": _device_name(accelerator.device),
        "weights": _measure_weights(measures),
        "versions": _library_versions(),
    }


def _measure_weights(measures: Measures) -> dict[str, str]:
    networks = {f"lpips_{net}": network for net, network in measures.lpips.items()}
    networks |= {"inception": measures.inception} if measures.inception is not None else {}
    return {name: weights_sha256(network) for name, network in networks.items()}


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads per process"


def _library_versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def titles(columns: list) -> list[str]:
    """Short names for tables and pictures: of folders and repositories the last part, if that tells them apart."""
    short = [column.name.rstrip("/").split("/")[-1] for column in columns]
    counts = Counter(short)
    return [name if counts[name] == 1 else column.name for name, column in zip(short, columns, strict=True)]


def write_results(result: dict, pictures: dict[str, Tensor], folder: Path) -> None:
    """evaluation.json, evaluation.md and comparison.png, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "evaluation.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
    write_text(folder / "evaluation.md", to_markdown(result))
    if not len(pictures["original"]):
        return
    picture = draw_comparison(pictures)
    temporary = folder / ".comparison.png"
    picture.save(temporary)
    temporary.replace(folder / "comparison.png")


def to_markdown(result: dict) -> str:
    """One row per model and anchor, one column per figure that any of them has; then the protocol."""
    reports = [EvaluationReport(**row) for row in result["models"] + result["anchors"]]
    known = {name for report in reports for name, value in report.figures().items() if value is not None}
    shown = {name: row for name, row in EVALUATION_FIGURES.items() if name in known}
    lines = [f"| | {' | '.join(title for title, _, _ in shown.values())} |", "|---" * (len(shown) + 1) + "|"]
    for title, report in zip(titles(reports), reports, strict=True):
        figures = report.figures()
        cells = (f"{figures[name]:.{digits}f}" if name in figures else "–" for name, (_, _, digits) in shown.items())
        lines.append(f"| {title} | {' | '.join(cells)} |")
    if note := result["protocol"].get("split_note"):
        lines += ["", f"Note: {note}"]
    timed = [report for report in reports if report.speed]
    speeds = [
        f"- {title}: " + ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in report.speed.items())
        for title, report in zip(titles(timed), timed, strict=True)
    ]
    notes = [
        f"- {report.name}: {_codec_note(report.details)}" for report in reports if "mean_quality" in report.details
    ]
    skipped = [f"- {name}: {reason}" for name, reason in result["skipped"].items()]
    protocol = [f"- {name}: {value}" for name, value in result["protocol"].items() if value is not None]
    for heading, block in (("Skipped", skipped), ("Codecs", notes), ("Speed", speeds), ("Protocol", protocol)):
        if block:
            lines += ["", f"## {heading}", "", *block]
    return "\n".join(["# Evaluation", "", *lines, ""])


def _codec_note(details: dict) -> str:
    note = f"mean quality {details['mean_quality']:.1f}"
    if details["shrunk_share"]:
        note += f"; {details['shrunk_share']:.1%} of the images at reduced size: the lowest quality was too large"
    if details["over_budget_share"]:
        note += f"; {details['over_budget_share']:.1%} over the budget even so"
    return note


def write_model_card(report: EvaluationReport, result: dict) -> None:
    """evaluation.json and README.md in a model's folder, for its own figures only."""
    own = report.figures() | {name: result[name] for name in ("protocol", "skipped")} | {"models": [asdict(report)]}
    folder = Path(report.name)
    write_text(folder / "evaluation.json", json.dumps(own | {"anchors": result["anchors"]}, indent=2) + "\n")
    write_text(folder / "README.md", str(update_model_card(folder, own)))
