"""Reports of latent spaces: latent_space.json, report.md and pictures of one model, bars of several."""

import json
from pathlib import Path

from ..files.documents import write_text
from ..measurement.latent_pictures import (
    draw_comparison,
    draw_interpolations,
    draw_neighbourhoods,
    draw_principal_colours,
    draw_walk,
)
from ..measurement.latent_space import Measure
from ..measurement.pictures import write_picture
from .latent_definitions import describe_protocol
from .latent_subject import Subject

REPORT_FILE = "latent_space.json"


def write_report(report: dict, folder: Path) -> None:
    """latent_space.json and report.md."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / REPORT_FILE, json.dumps(report, indent=2, allow_nan=False) + "\n")
    write_text(folder / "report.md", describe(report))


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
        write_picture(folder / name, picture.save)
    write_picture(folder / "walk.gif", first.save, save_all=True, append_images=others, duration=80, loop=0)


def measures_of(report: dict) -> dict[str, Measure]:
    measures = {name: entry for name, entry in report.items() if isinstance(entry, dict) and "value" in entry}
    for name, entry in measures.items():
        if isinstance(entry["protocol"], str):  # of an earlier version: a sentence
            measures[name] = entry | {"protocol": {"id": entry["protocol"]}}
    return {name: Measure(**entry) for name, entry in measures.items()}


def describe(report: dict) -> str:
    """report.md: one table, each row with its interval and direction, and what was done."""
    settings, latents = report["settings"], report["latents"]
    measures = measures_of(report)
    lines = [
        f"# Latent space of {report['model']}",
        "",
        f"{settings['images']} images of {settings['dataset']}, split {settings['split']}, "
        f"{settings['resolution']} pixels; latents {' x '.join(map(str, latents['shape']))}, "
        f"standard deviation {latents['std']:.4g}.",
        f"Perceptual distance: LPIPS {settings['perceptual_net']}, images enlarged x{settings['perceptual_upscale']}. "
        f"Fréchet and kernel distances in: {settings['feature_extractor']}, images enlarged "
        f"x{settings['feature_upscale']}.",
        "",
        "| measure | value | 95 % interval | unit | better | n |",
        "|---|---|---|---|---|---|",
    ]
    for name, measure in measures.items():
        interval = f"{measure.low:.4g} to {measure.high:.4g}"
        lines.append(
            f"| {name} | {measure.value:.4g} | {interval} | {measure.unit} | {measure.better or '-'} | {measure.n} |"
        )
    lines += [f"\nNot measured: {name}: {reason}." for name, reason in report["skipped"].items()]
    if report["split_note"]:
        lines += ["", f"Note: {report['split_note']}"]
    lines += ["", "## What was done", ""]
    lines += [f"- {name}: {describe_protocol(measure.protocol)}" for name, measure in measures.items()]
    return "\n".join(lines) + "\n"


def read_report(place: str | Path) -> dict:
    """latent_space.json of a folder. Raises FileNotFoundError if there is none."""
    file = Path(place) / REPORT_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{place} has no {REPORT_FILE}: analyse that model first, or give a dataset as well.")
    return json.loads(file.read_text())


def first_difference(there: dict, here: dict, label: str = "") -> str | None:
    """`LABEL KEY is VALUE there and VALUE`, of the first key whose values differ."""
    for key in there | here:
        if there.get(key) != here.get(key):
            return f"{label}{key} is {there.get(key)!r} there and {here.get(key)!r}"
    return None


def compare(reports: dict[str, dict], folder: Path) -> None:
    """
    Write comparison.png, every measure that all of `reports` (name -> report) have as bars with intervals, and
    comparison.md.

    Raises:
        ValueError: if they are of different images or feature extractors, or a measure was taken differently.
    """
    tables = {name: measures_of(report) for name, report in reports.items()}
    first, *others = reports
    shared = [key for key in tables[first] if all(key in table for table in tables.values())]
    for name in others:
        found = first_difference(reports[first]["settings"], reports[name]["settings"])
        for key in shared:
            found = found or first_difference(tables[first][key].protocol, tables[name][key].protocol, f"{key}: ")
        if found:
            raise ValueError(
                f"{first} and {name} cannot be compared: {found} here. Analyse both with the same settings."
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
    figure = draw_comparison({name: {key: table[key] for key in shared} for name, table in tables.items()})
    write_picture(folder / "comparison.png", figure.savefig)
