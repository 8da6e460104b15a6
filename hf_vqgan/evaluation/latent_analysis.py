"""The analysis of latent spaces: of one model on one dataset, and of several beside one another."""

import importlib.metadata
import logging
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from ..measurement.latent_space import Measure
from .latent_measures import GROUPS, SLOW
from .latent_options import LatentAnalysisConfig
from .latent_report import REPORT_FILE, compare, read_report, save_pictures, write_report
from .latent_subject import NotApplicable, Subject, prepare

logger = logging.getLogger(__name__)

PACKAGES = ("hf_vqgan", "torch", "torchmetrics", "diffusers", "transformers", "lpips")


@torch.no_grad()
def analyze(model_name: str, dataset_name: str, config: LatentAnalysisConfig) -> dict:
    """
    Measure the latent space of `model_name` on the images of `dataset_name`, and write latent_space.json, report.md and
    pictures to `config.output_dir`.

    Returns:
        What latent_space.json holds: a [`Measure`] as a dict under each measure's name, and `model`, `settings`,
        `latents`, `split_note`, `skipped` (group -> why it has no figures), `packages`, `seconds`.

    Raises:
        ValueError, FileNotFoundError: for a model, dataset or settings that cannot work, before anything is written.
    """
    started = time.perf_counter()
    subject = prepare(model_name, dataset_name, config)
    if subject.images.split_note:
        logger.warning("%s", subject.images.split_note)
    measures: dict[str, Measure] = {}
    skipped: dict[str, str] = {}
    for name in config.measures or [group for group in GROUPS if group not in SLOW]:
        print(f"{model_name}: {name}", flush=True)
        try:
            measures |= GROUPS[name](subject)
        except NotApplicable as reason:
            skipped[name] = str(reason)
    report = {
        **{name: asdict(measure) for name, measure in measures.items()},
        "model": model_name,
        "settings": settings_of(subject),
        "split_note": subject.images.split_note,
        "latents": {
            "shape": list(subject.latents.shape[1:]),
            "std": subject.std,
            "channel_means": subject.mean.flatten().tolist(),
            "channel_stds": subject.latents.transpose(0, 1).flatten(1).std(dim=1, correction=0).tolist(),
        },
        "skipped": skipped,
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "seconds": round(time.perf_counter() - started, 1),
    }
    folder = Path(config.output_dir)
    write_report(report, folder)
    save_pictures(subject, folder)
    return report


def settings_of(subject: Subject) -> dict:
    """What reports must share to be compared."""
    return {
        "dataset": subject.dataset_name,
        "split": subject.images.split,
        "images": len(subject.pixels),
        "resolution": subject.pixels.shape[2],
        "resize": subject.config.resize,
        "seed": subject.config.seed,
        "perceptual_net": subject.perceptual.net,
        "perceptual_upscale": subject.perceptual.upscale,
        "feature_extractor": subject.extractor.name,
        "feature_upscale": subject.extractor.upscale,
    }


def analyze_and_compare(model_name: str | None, dataset_name: str | None, config: LatentAnalysisConfig) -> None:
    """
    `analyze` the model if there is one; with `config.compare`, every model in it that is not the folder of a report,
    into a folder of its own in `config.output_dir`; then `compare`.
    """
    folder, reports = Path(config.output_dir), {}
    if model_name is None and not config.compare:
        raise ValueError("nothing to do: name a model and a dataset, or reports to --compare.")
    if model_name is not None and dataset_name is None:
        raise ValueError(f"name a dataset to analyse {model_name} on.")
    if model_name is not None:
        reports[Path(model_name).name] = analyze(model_name, dataset_name, config)
    for place in config.compare:
        name = Path(place).name
        if name in reports:
            raise ValueError(f"two models are called {name!r}: give their folders different names.")
        if (Path(place) / REPORT_FILE).is_file() or dataset_name is None:
            reports[name] = read_report(place)
        else:
            reports[name] = analyze(place, dataset_name, replace(config, output_dir=str(folder / name)))
    if config.compare:
        compare(reports, folder)
