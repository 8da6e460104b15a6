"""What a comparison of generated images has found, and its files: generation.json, generation.md, pictures."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor

from ..files.documents import write_text
from ..measurement.feature_networks import FeatureNetwork
from ..measurement.generation_pictures import draw_grids, draw_side_by_side, draw_sweep
from ..measurement.pictures import draw_comparison, write_picture

SCORE_PARTS = 10  # of the Inception score
LIBRARIES = ("hf_vqgan", "torch", "torchvision", "torch-fidelity", "transformers", "diffusers", "pillow")

# What is measured -> (name where the features are Inception's, title of that, title elsewhere, digits)
FIGURES = {
    "frechet_distance": ("gfid", "gFID", "FD", 3),
    "sfid": ("sfid", "sFID", "", 3),
    "kernel_distance": ("gkid", "gKID", "KD", 5),
    "kernel_distance_std": ("gkid_std", "± of gKID", "± of KD", 5),
    "inception_score": ("inception_score", "Inception score", "", 2),
    "inception_score_std": ("inception_score_std", "± of Inception score", "", 2),
    "precision": ("precision", "precision", "precision", 3),
    "recall": ("recall", "recall", "recall", 3),
    "nearest_distance": ("nearest_distance", "nearest real image", "nearest real image", 3),
    "memorization_ratio": ("memorization_ratio", "the same / held-out's", "the same / held-out's", 3),
}
SHORT = {"frechet_distance": "fd", "kernel_distance": "kd", "kernel_distance_std": "kd"}


def name_figures(network: FeatureNetwork, found: dict[str, float | None]) -> dict[str, float]:
    """Figures of one network under the names of generation.json: only Inception's are called gfid, gkid, ..."""
    return {figure_name(key, network.id): value for key, value in found.items() if value is not None}


def figure_name(key: str, network: str) -> str:
    if network == "inception":
        return FIGURES[key][0]
    suffix = "_std" if key.endswith("_std") else ""
    return f"{SHORT.get(key, key)}_{network}{suffix}"


@dataclass
class GenerationReport:
    """
    One set of images.

    Args:
        name (`str`): Pipeline, folder or archive as it was named; of real images their split.
        kind (`str`): Class of the pipeline; `"images"` that were made elsewhere; `"held_out"` real ones.
        guidance_scale (`float`, *optional*): `None`: the pipeline's own default.
        num_images (`int`): How many were measured.
        figures (`dict`): By name, as in generation.json.
        samples_per_second (`float`, *optional*): Of a pipeline, over all processes, features included.
    """

    name: str
    kind: str
    guidance_scale: float | None
    num_images: int
    figures: dict[str, float]
    samples_per_second: float | None = None

    def as_dict(self) -> dict:
        """For a JSON file, figures beside the rest."""
        return {name: value for name, value in asdict(self).items() if name != "figures"} | self.figures


@dataclass(frozen=True)
class GenerationProtocol:
    """
    Everything that figures depend on.

    Args:
        dataset, split, held_out_split (`str`, *optional*): Real images.
        reference (`str`, *optional*): Archive of real images or statistics.
        num_reference_images (`int`, *optional*): Images that precision, recall and kernel distances compare with.
        resolution, resize (`int`): Side of the central square; shorter side before cropping, 0 for the image's own.
        num_samples, seed (`int`): How many samples; of their noise and classes.
        features (`dict`): By network, what it does and the checksum of its weights.
        versions (`dict`): Of libraries.
    """

    dataset: str | None
    split: str | None
    held_out_split: str | None
    reference: str | None
    num_reference_images: int | None
    resolution: int
    resize: int
    num_samples: int
    seed: int
    num_inference_steps: int | None
    class_column: str | None
    class_balance: str | None
    features: dict[str, dict] = field(default_factory=dict)
    mixed_precision: str = "no"
    batch_size: int = 1
    processes: int = 1
    versions: dict[str, str] = field(default_factory=dict)


@dataclass
class GenerationResult:
    """
    Args:
        reports (`list[GenerationReport]`): One per pipeline and guidance scale.
        titles (`list[str]`): Short names for them.
        held_out (`GenerationReport`, *optional*): Of real images that models have not seen.
        skipped (`dict`): What could not be had, with the reason.
    """

    reports: list[GenerationReport]
    titles: list[str]
    held_out: GenerationReport | None
    protocol: GenerationProtocol
    skipped: dict[str, str]

    def as_dict(self) -> dict:
        """For generation.json: the first report's figures, then everybody's."""
        return self.reports[0].as_dict() | {
            "pipelines": [report.as_dict() for report in self.reports],
            "held_out": self.held_out.as_dict() if self.held_out else None,
            "protocol": asdict(self.protocol),
            "skipped": self.skipped,
        }


def titles(runs: Sequence[tuple[str, float | None]]) -> list[str]:
    """Short names of (pipeline, guidance scale): of paths the last part, if that tells them apart, and the scale."""
    names = list(dict.fromkeys(name for name, _ in runs))
    short = {name: name.rstrip("/").split("/")[-1] for name in names}
    counts = Counter(short.values())
    shown = {name: short[name] if counts[short[name]] == 1 else name for name in names}
    found = [shown[name] + ("" if scale is None else f", guidance {scale:g}") for name, scale in runs]
    return [title if found.count(title) == 1 else f"{number}: {title}" for number, title in enumerate(found, start=1)]


def file_name(title: str) -> str:
    """A title as a folder's name."""
    return re.sub(r"[^\w.]+", "-", title).strip("-")


def write_generation(
    result: GenerationResult, samples: dict[str, Tensor], closest: dict[str, dict[str, Tensor]], folder: Path
) -> None:
    """
    generation.json, generation.md and the pictures, each whole or not at all.

    Args:
        samples (`dict[str, Tensor]`): By title, uint8 `(N, 3, side, side)`.
        closest (`dict`): By title, columns of neighbours.png; none, no picture.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "generation.json", json.dumps(result.as_dict(), indent=2, allow_nan=False) + "\n")
    write_text(folder / "generation.md", to_markdown(result))
    for name in ("samples.png", "neighbours.png", "guidance.png"):  # an earlier comparison's
        (folder / name).unlink(missing_ok=True)
    if any(len(images) for images in samples.values()):
        write_picture(folder / "samples.png", draw_grids(samples).save, format="PNG")
    if closest:
        shown = draw_side_by_side([draw_comparison(columns) for columns in closest.values()])
        write_picture(folder / "neighbours.png", shown.save, format="PNG")
    if curves := sweeps(result):
        write_picture(folder / "guidance.png", draw_sweep(curves, held_out_figures(result)).save, format="PNG")


def sweeps(result: GenerationResult) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Title of a figure to pipeline to (guidance scale, value), for pipelines that were sampled at several."""
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    scaled = Counter(report.name for report in result.reports if report.guidance_scale is not None)
    for name, (title, _) in shown_figures(result).items():
        for report in result.reports:
            if scaled[report.name] > 1 and name in report.figures:
                points = curves.setdefault(title, {}).setdefault(report.name, [])
                points.append((report.guidance_scale, report.figures[name]))
    return curves


def held_out_figures(result: GenerationResult) -> dict[str, float]:
    """Title of a figure to its value for held-out images."""
    if result.held_out is None:
        return {}
    own = result.held_out.figures
    return {title: own[name] for name, (title, _) in shown_figures(result).items() if name in own}


def shown_figures(result: GenerationResult) -> dict[str, tuple[str, int]]:
    """The figures that some report has, in the table's order: name to title and digits."""
    known = {name for report in result.reports for name in report.figures}
    found = {}
    for network in result.protocol.features:
        for key, (_, title, elsewhere, digits) in FIGURES.items():
            if (name := figure_name(key, network)) in known and not key.endswith("_std"):
                found[name] = (title if network == "inception" else f"{elsewhere} ({network})", digits)
    return found


def to_markdown(result: GenerationResult) -> str:
    """One row per set of images, one column per figure that any of them has; then the protocol."""
    shown = shown_figures(result)
    lines = ["| | images | " + " | ".join(title for title, _ in shown.values()) + " |"]
    lines += ["|---" * (len(shown) + 2) + "|"]
    rows = list(zip(result.titles, result.reports, strict=True))
    if result.held_out is not None:
        rows.append((f"real images, split {result.held_out.name}", result.held_out))
    for title, report in rows:
        cells = [_cell(report.figures, name, digits) for name, (_, digits) in shown.items()]
        lines.append(f"| {title} | {report.num_images} | {' | '.join(cells)} |")
    skipped = [f"- {name}: {reason}" for name, reason in result.skipped.items()]
    protocol = [f"- {name}: {_plain(value)}" for name, value in asdict(result.protocol).items() if value is not None]
    for heading, block in (("Skipped", skipped), ("Protocol", protocol)):
        if block:
            lines += ["", f"## {heading}", "", *block]
    return "\n".join(["# Generated images", "", *lines, ""])


def _cell(figures: dict[str, float], name: str, digits: int) -> str:
    if name not in figures:
        return "–"
    deviation = figures.get("gkid_std" if name == "gkid" else f"{name}_std")
    return f"{figures[name]:.{digits}f}" + (f" ± {deviation:.{digits}f}" if deviation is not None else "")


def _plain(value) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name} {_plain(entry)}" for name, entry in value.items())
    return str(value)
