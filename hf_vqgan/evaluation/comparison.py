"""Autoencoders, and JPEG and WebP at their bits, on the same images: figures that say how they were made."""

import itertools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from ..data.datasets import to_pixel_values
from ..data.images import ImageOptions, SplitImages, open_images
from ..files.options import check_values, option
from ..generation.encoded_dataset import weights_sha256
from ..losses.lpips_weights import NETWORKS
from ..measurement.frechet import frechet_distance, inception_score
from ..measurement.metrics import mean_perplexity
from ..training.setup import share_cpu_threads
from .autoencoders import Autoencoder, load_autoencoder
from .contestants import CodecContestant, Contestant, ModelContestant
from .image_codecs import CODECS
from .measures import Judges, Originals, Reconstructions, TallySize
from .report import (
    SCORE_PARTS,
    Evaluation,
    EvaluationProtocol,
    EvaluationReport,
    device_name,
    library_versions,
    titles,
)
from .timing import measure_speed

logger = logging.getLogger(__name__)


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
    with accelerator.main_process_first():  # one process fills the caches, the others read them
        models = [load_autoencoder(name).to(accelerator.device) for name in model_names]
        resolution = models[0].model.config.sample_size if config.resolution is None else config.resolution
        check_request(models, resolution, config)
        images = open_images(ImageOptions.of(dataset_name, config, resolution=resolution))
        judges = load_judges(config, resolution, accelerator.device)
    if images.split_note and accelerator.is_main_process:
        logger.warning("%s", images.split_note)
    contestants: list[Contestant] = [ModelContestant(model, accelerator.autocast) for model in models]
    budgets = dict.fromkeys(model.bits_per_pixel for model in models if model.is_discrete)
    codecs = [codec for codec in dict.fromkeys(config.anchors) if codec != "none"]
    contestants += [CodecContestant(codec, bits) for bits, codec in itertools.product(budgets, codecs)]
    with torch.no_grad(), full_precision():
        originals, tallies = tally_images(contestants, images, judges, accelerator, config)
    count = int(originals.readable.sum())
    if judges.inception is not None and count < SCORE_PARTS:
        judges.skipped["rfid, ris"] = f"they need {SCORE_PARTS} images, and there are {count}."
    reports = [make_report(*pair, originals, judges) for pair in zip(contestants, tallies, strict=True)]
    protocol = describe_protocol(images, originals, judges, accelerator, config)
    evaluation = Evaluation(reports[: len(models)], reports[len(models) :], protocol, judges.skipped)
    if accelerator.is_main_process:
        kept = originals.readable[originals.shown].bool()
        pictures = {"original": originals.pictures[kept]}
        for title, tally in zip(titles(contestants), tallies, strict=True):
            pictures[title] = tally.pictures[kept]
        evaluation.write(pictures, Path(config.output_dir))
        if config.update_model_card:
            evaluation.write_model_cards()
    accelerator.wait_for_everyone()
    return evaluation.as_dict()


def load_judges(config: EvaluationConfig, resolution: int, device: torch.device) -> Judges:
    judges = Judges({net: getattr(config, f"{net}_weights_path") for net in config.lpips}, resolution, device)
    if config.inception:
        judges.load_inception(config.inception_weights_path)
    return judges


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
    contestants: Sequence[Contestant],
    images: SplitImages,
    judges: Judges,
    accelerator: Accelerator,
    config: EvaluationConfig,
) -> tuple[Originals, list[Reconstructions]]:
    """
    Pass all images through all contestants, each process its share, and gather what is measured.

    Raises:
        ValueError: if not one image can be read.
    """
    shown = np.linspace(0, len(images) - 1, min(config.pictures, len(images))).astype(int).tolist()
    size = TallySize(len(images), shown, images.options.resolution, judges.inception is not None)
    originals = Originals(size)
    tallies = [Reconstructions(size, judges.names + one.figure_names, one.num_counts) for one in contestants]
    batches = images.squares().batches(
        config.batch_size, config.dataloader_num_workers, accelerator.process_index, accelerator.num_processes
    )
    timed = False
    for batch in tqdm(batches, desc="evaluate", unit=" batches", disable=not accelerator.is_local_main_process):
        pixels = to_pixel_values(batch.squares.to(accelerator.device))
        originals.add(batch, pixels, judges.inception)
        features = judges.features(pixels)
        for contestant, tally in zip(contestants, tallies, strict=True):
            if not timed and isinstance(contestant, ModelContestant):
                with contestant.autocast():
                    contestant.speed = measure_speed(contestant.autoencoder, pixels)
            made = contestant.reconstruct(pixels)
            tally.add(batch.rows, made, judges.compare(made.sample, pixels, features), judges.inception)
        timed = True
    originals.gather(accelerator.device)
    for tally in tallies:
        tally.gather(accelerator.device)
    if not originals.readable.any():
        raise ValueError(f"dataset {images.options.dataset_name!r}: not one of {len(images)} images can be read.")
    return originals, tallies


def make_report(
    contestant: Contestant, tally: Reconstructions, originals: Originals, judges: Judges
) -> EvaluationReport:
    """The report of a contestant whose tally has been gathered."""
    readable = originals.readable.bool()
    figures = {name: values[readable] for name, values in tally.figures.items()}
    means: dict[str, Any] = {name: float(values.mean()) for name, values in figures.items()}
    count = int(readable.sum())
    report = EvaluationReport(
        name=contestant.name,
        kind=contestant.kind,
        num_images=count,
        **{name: means[name] for name in judges.names},
        bits_per_pixel=contestant.bits_per_pixel(means),
        details=contestant.details(means),
        speed=contestant.speed,
    )
    if count > 1:
        report.standard_errors = {name: float(figures[name].std()) / count**0.5 for name in judges.names}
    if len(tally.counts):
        report.perplexity = mean_perplexity(tally.counts, contestant.num_codebooks)
        report.usage = float((tally.counts > 0).double().mean())
    if tally.moments is not None and count >= SCORE_PARTS:
        report.rfid = frechet_distance(originals.moments, tally.moments)
        report.ris, report.ris_std = inception_score(tally.logits[readable], SCORE_PARTS)
    return report


@contextmanager
def full_precision() -> Iterator[None]:
    """Convolutions in true float32: TF32, CUDA's default for them, changes the fourth digit of LPIPS and FID."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def describe_protocol(
    images: SplitImages, originals: Originals, judges: Judges, accelerator: Accelerator, config: EvaluationConfig
) -> EvaluationProtocol:
    networks = {f"lpips_{net}": network for net, network in judges.lpips.items()}
    networks |= {"inception": judges.inception} if judges.inception is not None else {}
    count = int(originals.readable.sum())
    return EvaluationProtocol(
        dataset=images.options.dataset_name,
        split=images.split,
        num_images=count,
        resolution=images.options.resolution,
        resize=images.options.transform().resize,
        dataset_config=config.dataset_config_name,
        dataset_commit=images.commit,
        split_note=images.split_note,
        unreadable_images=len(images) - count,
        enlarged_images=int(originals.enlarged.sum()),
        max_samples=config.max_samples,
        pixels_sha256=originals.pixels_sha256,
        mixed_precision=config.mixed_precision,
        batch_size=config.batch_size,
        processes=accelerator.num_processes,
        device=device_name(accelerator.device),
        weights={name: weights_sha256(network) for name, network in networks.items()},
        versions=library_versions(),
    )
