"""
What is measured of originals and reconstructions, image by image, and kept until all processes have theirs.

Figures are kept per image in float64 and added up at the end, so that neither the number of processes nor the batch
size changes a mean. Fréchet distances come from sums over all images.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.images import SquareBatch
from ..losses.image_losses import LPIPS
from ..losses.lpips_weights import NETWORKS
from ..measurement.frechet import CLASSES, FeatureMoments, InceptionFeatures, to_bytes
from ..measurement.metrics import pixel_figures, sum_over_processes
from .contestants import Reconstruction


class Judges:
    """
    The networks that judge: LPIPS and Inception, as far as they can be had. `skipped` says which cannot, and why.

    Args:
        lpips (`dict[str, str or None]`): Network to its weights file, if one was named.

    Raises:
        ValueError, FileNotFoundError: for a weights file that was named and is not there or holds something else.
    """

    def __init__(self, lpips: dict[str, str | None], resolution: int, device: torch.device):
        self.device = device
        self.skipped: dict[str, str] = {}
        self.lpips: dict[str, LPIPS] = {}
        self.inception: InceptionFeatures | None = None
        for net, path in lpips.items():
            if resolution < NETWORKS[net].min_side:
                self.skipped[f"lpips_{net}"] = f"needs images of {NETWORKS[net].min_side} pixels, not {resolution}."
            elif (network := self._load(f"lpips_{net}", path, lambda net=net, path=path: LPIPS(net, path))) is not None:
                self.lpips[net] = network

    def load_inception(self, path: str | None) -> None:
        self.inception = self._load("rfid, ris", path, lambda: InceptionFeatures(path))

    def _load(self, name: str, path: str | None, load: Callable):
        try:
            return load().to(self.device)
        except FileNotFoundError as error:
            if path is not None:
                raise
            self.skipped[name] = str(error)
            return None

    @property
    def names(self) -> tuple[str, ...]:
        """Figures that `compare` gives per image."""
        return ("psnr", "ssim", "l1", *(f"lpips_{net}" for net in self.lpips))

    def features(self, pixels: Tensor) -> dict[str, list[Tensor]]:
        """LPIPS features of `(B, 3, H, W)` in [-1, 1] per network, so that each original goes through once."""
        return {net: network.features(pixels) for net, network in self.lpips.items()}

    def compare(self, sample: Tensor, pixels: Tensor, features: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        """Figures `(B,)` of reconstructions against images, both in [-1, 1]; `features` are those of the images."""
        figures = pixel_figures(sample, pixels)
        for net, network in self.lpips.items():
            figures[f"lpips_{net}"] = network.distance(network.features(sample), features[net])
        return figures


@dataclass(frozen=True)
class TallySize:
    """
    Args:
        num_images (`int`): N, of all processes, readable or not.
        shown (`list[int]`): Numbers of the images that pictures are kept of, and `side`, their side.
        with_inception (`bool`): Whether Inception's features will be counted.
    """

    num_images: int
    shown: list[int]
    side: int
    with_inception: bool


class Tally:
    """A set of images, originals or reconstructions: of this process until `gather`, then of all."""

    def __init__(self, size: TallySize):
        self.shown = size.shown
        self.pictures = torch.zeros(len(size.shown), 3, size.side, size.side, dtype=torch.uint8)
        self.moments = FeatureMoments() if size.with_inception else None
        self.logits = torch.zeros(size.num_images if size.with_inception else 0, CLASSES)

    def add_pixels(self, rows: list[int], pixels: Tensor, inception: InceptionFeatures | None) -> None:
        """Images number `rows`, `(B, 3, H, W)` in [-1, 1]."""
        for row, image in zip(rows, pixels, strict=True):
            if row in self.shown:
                self.pictures[self.shown.index(row)] = to_bytes(image).cpu()
        if inception is not None:
            features, logits = inception(pixels)
            self.moments.update(features)
            self.logits[rows] = logits.cpu()

    def gather(self, device: torch.device) -> None:
        """Every process's share becomes that of all."""
        for name, value in vars(self).items():
            setattr(self, name, _over_processes(value, device))


def _over_processes(value: Any, device: torch.device) -> Any:
    match value:
        case Tensor():
            return sum_over_processes(value, device)
        case FeatureMoments():
            return value.over_processes(device)
        case dict():
            return {name: _over_processes(entry, device) for name, entry in value.items()}
    return value


class Originals(Tally):
    """
    The images, with whether they were `readable` and `enlarged`, `(N,)` of 0 and 1, and the SHA-256 of their pixels,
    `digests` `(N, 32)`.
    """

    def __init__(self, size: TallySize):
        super().__init__(size)
        self.readable, self.enlarged = torch.zeros(2, size.num_images, dtype=torch.uint8)
        self.digests = torch.zeros(size.num_images, hashlib.sha256().digest_size, dtype=torch.uint8)

    def add(self, batch: SquareBatch, pixels: Tensor, inception: InceptionFeatures | None) -> None:
        self.add_pixels(batch.rows, pixels, inception)
        self.readable[batch.rows] = 1
        self.enlarged[batch.rows] = torch.tensor(batch.enlarged, dtype=torch.uint8)
        for row, square in zip(batch.rows, batch.squares, strict=True):
            self.digests[row] = torch.tensor(list(hashlib.sha256(square.numpy().tobytes()).digest()))

    @property
    def pixels_sha256(self) -> str:
        """Checksum of the pixels of all readable images."""
        return hashlib.sha256(self.digests[self.readable.bool()].numpy().tobytes()).hexdigest()


class Reconstructions(Tally):
    """
    One contestant's: `figures`, by name `(N,)`, and the histogram of codes `(n*K,)`, empty if it has none.
    """

    def __init__(self, size: TallySize, names: tuple[str, ...], num_counts: int):
        super().__init__(size)
        self.figures = {name: torch.zeros(size.num_images, dtype=torch.float64) for name in names}
        self.counts = torch.zeros(num_counts, dtype=torch.int64)

    def add(
        self, rows: list[int], made: Reconstruction, figures: dict[str, Tensor], inception: InceptionFeatures | None
    ) -> None:
        self.add_pixels(rows, made.sample, inception)
        for name, values in (figures | made.figures).items():
            self.figures[name][rows] = values.cpu().double()
        if made.codes is not None:
            self.counts += torch.bincount(made.codes, minlength=len(self.counts))
