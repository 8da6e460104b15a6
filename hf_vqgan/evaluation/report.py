"""What a comparison has found, and its files: evaluation.json, evaluation.md, comparison.png, a model's card."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from ..files.documents import write_text
from ..hub.model_card import EVALUATION_FIGURES, update_model_card
from ..measurement.pictures import draw_comparison, write_picture
from ..measurement.protocol import Protocol
from .contestants import CodecDetails, ModelDetails
from .timing import Speed

SCORE_PARTS = 10  # of the Inception score
LIBRARIES = ("hf_vqgan", "torch", "torchvision", "torchmetrics", "lpips", "torch-fidelity", "transformers", "diffusers",
             "pillow")  # fmt: skip

# What evaluation.md says of the figures.
DEFINITIONS = {
    "crop": "images smaller than the square are enlarged; bicubic with antialiasing (torchvision, on 8-bit pixels)",
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
    "speed": "one batch in one process, median of 5 after a warm-up; peak memory beyond weights and input: on CUDA the "
    "allocator's, on CPU tensors alive at once",
    "standard_errors": "deviation over images / sqrt(number of images)",
}


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
        details: What the model is, or how the codec was driven.
        speed (`Speed`, *optional*): Of models.
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
    details: ModelDetails | CodecDetails | None = None
    speed: Speed | None = None

    def figures(self) -> dict[str, float]:
        """The scalars that could be had, by name; `lpips` is the one with AlexNet, as in a run's metrics.json."""
        scalars = {name: value for name, value in asdict(self).items() if isinstance(value, (int, float))}
        return scalars | ({"lpips": self.lpips_alex} if self.lpips_alex is not None else {})

    def as_dict(self) -> dict:
        return asdict(self) | {"speed": asdict(self.speed) if self.speed else {}}


@dataclass(frozen=True)
class EvaluationProtocol(Protocol):
    """
    Everything that figures depend on.

    Args:
        dataset_commit (`str`, *optional*): Of a Hub dataset.
        split_note (`str`, *optional*): Warns of images that models may have been trained on.
        unreadable_images, enlarged_images (`int`): Left out; smaller than the square.
        max_samples (`int`, *optional*): Of how many rows of the split, from the first; `None`: of all.
        pixels_sha256 (`str`): Checksum of exactly the pixels that were compared.
        weights (`dict`): Checksums of the networks that judge.
        versions (`dict`): Of libraries.
    """

    dataset_config: str | None = None
    dataset_commit: str | None = None
    split_note: str | None = None
    unreadable_images: int = 0
    enlarged_images: int = 0
    max_samples: int | None = None
    pixels_sha256: str = ""
    mixed_precision: str = "no"
    batch_size: int = 1
    processes: int = 1
    device: str = ""
    weights: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads per process"


def library_versions(names: Iterable[str] = LIBRARIES) -> dict[str, str]:
    """Installed versions of distributions by name; "not installed" where there is none."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


@dataclass
class Evaluation:
    """
    All reports, of models and of the codecs that anchor them, and how they were made.

    Args:
        skipped (`dict`): Figures that could not be had, and why.
    """

    models: list[EvaluationReport]
    anchors: list[EvaluationReport]
    protocol: EvaluationProtocol
    skipped: dict[str, str]

    def as_dict(self) -> dict:
        """evaluation.json: the first model's figures at the top, then everything."""
        return self.models[0].figures() | {
            "protocol": self.protocol.as_dict(),
            "skipped": self.skipped,
            "models": [report.as_dict() for report in self.models],
            "anchors": [report.as_dict() for report in self.anchors],
        }

    def to_markdown(self) -> str:
        """One row per model and anchor, one column per figure that any of them has; then the protocol."""
        reports = self.models + self.anchors
        known = {name for report in reports for name in report.figures()}
        shown = {name: row for name, row in EVALUATION_FIGURES.items() if name in known}
        lines = [f"| | {' | '.join(title for title, _, _ in shown.values())} |", "|---" * (len(shown) + 1) + "|"]
        for title, report in zip(titles(reports), reports, strict=True):
            figures = report.figures()
            cells = [f"{figures[name]:.{row[2]}f}" if name in figures else "–" for name, row in shown.items()]
            lines.append(f"| {title} | {' | '.join(cells)} |")
        if note := self.protocol.split_note:
            lines += ["", f"Note: {note}"]
        timed = [report for report in self.models if report.speed]
        blocks = {
            "Skipped": self.skipped,
            "Codecs": {one.name: one.details.describe() for one in reports if isinstance(one.details, CodecDetails)},
            "Speed": {
                title: ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in asdict(one.speed).items())
                for title, one in zip(titles(timed), timed, strict=True)
            },
            "Protocol": {name: value for name, value in self.protocol.as_dict().items() if value is not None},
            "Definitions": DEFINITIONS,
        }
        for heading, block in blocks.items():
            if block:
                lines += ["", f"## {heading}", "", *(f"- {name}: {value}" for name, value in block.items())]
        return "\n".join(["# Evaluation", "", *lines, ""])

    def write(self, pictures: dict[str, Tensor], folder: Path) -> None:
        """evaluation.json, evaluation.md and, of title -> uint8 `(N, 3, S, S)`, comparison.png; each whole or not."""
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "evaluation.json", json.dumps(self.as_dict(), indent=2, allow_nan=False) + "\n")
        write_text(folder / "evaluation.md", self.to_markdown())
        if all(len(images) for images in pictures.values()):
            write_picture(folder / "comparison.png", draw_comparison(pictures).save)

    def write_model_cards(self) -> None:
        """evaluation.json and README.md in each model's folder, for its own figures only."""
        for report in self.models:
            own, folder = Evaluation([report], self.anchors, self.protocol, self.skipped).as_dict(), Path(report.name)
            write_text(folder / "evaluation.json", json.dumps(own, indent=2) + "\n")
            write_text(folder / "README.md", str(update_model_card(folder, own)))


def titles(named: Sequence) -> list[str]:
    """Short names for tables and pictures: of folders and repositories the last part, if that tells them apart."""
    short = [one.name.rstrip("/").split("/")[-1] for one in named]
    counts = Counter(short)
    return [name if counts[name] == 1 else one.name for name, one in zip(short, named, strict=True)]
