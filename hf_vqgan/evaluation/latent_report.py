"""Reports of latent spaces: latent_space.json, report.md and pictures of one model, bars of several."""

import importlib.metadata
import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from ..files.documents import write_text
from ..measurement.latent_pictures import (
    draw_comparison,
    draw_interpolations,
    draw_neighbourhoods,
    draw_principal_colours,
    draw_walk,
)
from ..measurement.latent_space import Measure
from .latent_analysis import GROUPS, SLOW, LatentAnalysisConfig, NotApplicable, Subject, prepare

REPORT_FILE = "latent_space.json"
PACKAGES = ("hf_vqgan", "torch", "torchmetrics", "diffusers", "transformers", "lpips")


@torch.no_grad()
def analyze(model_name: str, dataset_name: str, config: LatentAnalysisConfig) -> dict:
    """
    Measure the latent space of `model_name` on the images of `dataset_name`, and write latent_space.json, report.md and
    pictures to `config.output_dir`.

    Returns:
        What latent_space.json holds: a [`Measure`] as a dict under each measure's name, and `model`, `settings`,
        `latents`, `skipped` (group -> why it has no figures), `packages`, `seconds`.

    Raises:
        ValueError, FileNotFoundError: for a model, dataset or settings that cannot work, before anything is written.
    """
    started = time.perf_counter()
    subject, settings = prepare(model_name, dataset_name, config)
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
        "settings": settings,
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
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / REPORT_FILE, json.dumps(report, indent=2, allow_nan=False) + "\n")
    write_text(folder / "report.md", describe(report))
    save_pictures(subject, folder)
    return report


def save_pictures(subject: Subject, folder: Path) -> None:
    """interpolations.png, principal_colours.png, walk.gif and, of models with codes, neighbourhoods.png."""
    discrete = subject.autoencoder.is_discrete
    decoders = {"continuous": subject.decode_centred}
    if discrete:
        decoders["quantized"] = subject.decode_centred_quantized
    pictures = {
        "interpolations.png": draw_interpolations(decoders, subject.centred, subject.pixels),
        "principal_colours.png": draw_principal_colours(subject.pixels, subject.latents),
    }
    if discrete:
        # The image with the most different codes has most to show.
        context = max(subject.codes.split(1), key=lambda indices: len(indices[..., 0].unique()))
        pictures["neighbourhoods.png"] = draw_neighbourhoods(subject.decode_indices, subject.codebooks()[0], context)
    first, *others = draw_walk(decoders, subject.centred[:5])
    for name, picture in pictures.items():
        picture.save(folder / f".{name}")
        (folder / f".{name}").replace(folder / name)
    first.save(folder / ".walk.gif", save_all=True, append_images=others, duration=80, loop=0)
    (folder / ".walk.gif").replace(folder / "walk.gif")


def measures_of(report: dict) -> dict[str, Measure]:
    return {name: Measure(**entry) for name, entry in report.items() if isinstance(entry, dict) and "protocol" in entry}


def describe(report: dict) -> str:
    """report.md: one table, each row with its interval and direction."""
    settings, latents = report["settings"], report["latents"]
    lines = [
        f"# Latent space of {report['model']}",
        "",
        f"{settings['images']} images of {settings['dataset']}, split {settings['split']}, "
        f"{settings['resolution']} pixels; latents {' x '.join(map(str, latents['shape']))}, "
        f"standard deviation {latents['std']:.4g}.",
        f"Perceptual distance: {settings['perceptual_distance']}. Fréchet and kernel distances in: "
        f"{settings['feature_extractor']}.",
        "",
        "| measure | value | 95 % interval | unit | better | n |",
        "|---|---|---|---|---|---|",
    ]
    for name, measure in measures_of(report).items():
        interval = f"{measure.low:.4g} to {measure.high:.4g}"
        lines.append(
            f"| {name} | {measure.value:.4g} | {interval} | {measure.unit} | {measure.better or '-'} | {measure.n} |"
        )
    lines += [f"\nNot measured: {name}: {reason}." for name, reason in report["skipped"].items()]
    return "\n".join(lines) + "\n"


def read_report(place: str | Path) -> dict:
    """latent_space.json of a folder. Raises FileNotFoundError if there is none."""
    file = Path(place) / REPORT_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{place} has no {REPORT_FILE}: analyse that model first, or give a dataset as well.")
    return json.loads(file.read_text())


def compare(reports: dict[str, dict], folder: Path) -> None:
    """
    Write comparison.png, every measure that all of `reports` (name -> report) have as bars with intervals, and
    comparison.md.

    Raises:
        ValueError: if they are of different images or feature extractors, or a measure was taken differently.
    """
    (first, reference), *others = reports.items()
    for name, report in others:
        for key, value in reference["settings"].items():
            if report["settings"].get(key) != value:
                raise ValueError(
                    f"{first} and {name} cannot be compared: {key} is {value!r} there and "
                    f"{report['settings'].get(key)!r} here. Analyse both with the same settings."
                )
    tables = {name: measures_of(report) for name, report in reports.items()}
    shared = [name for name in tables[first] if all(name in table for table in tables.values())]
    for name, table in tables.items():
        if differing := [key for key in shared if table[key].protocol != tables[first][key].protocol]:
            raise ValueError(
                f"{first} and {name} cannot be compared: {differing[0]} is "
                f"{tables[first][differing[0]].protocol!r} there and {table[differing[0]].protocol!r} here. "
                "Analyse both with the same settings."
            )
    if not shared:
        raise ValueError(f"{', '.join(reports)} have no measure in common.")
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"| measure | better | {' | '.join(tables)} |", "|---|---|" + "---|" * len(tables)]
    for key in shared:
        cells = [f"{t[key].value:.4g} ({t[key].low:.4g} to {t[key].high:.4g})" for t in tables.values()]
        lines.append(f"| {key} | {tables[first][key].better or '-'} | {' | '.join(cells)} |")
    left_out = sorted({key for table in tables.values() for key in table} - set(shared))
    if left_out:
        lines.append(f"\nNot of all models: {', '.join(left_out)}.")
    write_text(folder / "comparison.md", "\n".join(lines) + "\n")
    draw_comparison({name: {key: table[key] for key in shared} for name, table in tables.items()}).savefig(
        folder / ".comparison.png"
    )
    (folder / ".comparison.png").replace(folder / "comparison.png")


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
