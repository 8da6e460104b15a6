"""Fréchet distance and Inception score, from sums over images that processes can add up.

The network is torch-fidelity's port of the TensorFlow Inception of the original FID, resizing included; what is done
with its features is here, since the ports keep all features in memory of one process.
"""

import importlib.util
import socket
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import constants
from torch import Tensor, nn

from .metrics import sum_over_processes

FEATURES, CLASSES = 2048, 1008  # of Inception: its last pooling layer, and its logits
SPATIAL_CHANNELS = 7  # of 192, at 17x17 positions, so that sFID has about as many features as FID


class FeatureMoments:
    """
    Number, sum and sum of outer products of feature vectors `(N, dim)`, in float64 on CPU.

    Args:
        dim (`int`): Length of a vector.
    """

    def __init__(self, dim: int = FEATURES):
        self.count = torch.zeros((), dtype=torch.float64)
        self.sum = torch.zeros(dim, dtype=torch.float64)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64)
        self._root: Tensor | None = None

    def update(self, features: Tensor) -> None:
        """Add `(N, dim)`, on any device and in any float type."""
        features = features.detach().cpu().double()
        self.count += len(features)
        self.sum += features.sum(dim=0)
        self.outer.addmm_(features.T, features)
        self._root = None

    def over_processes(self, device: torch.device) -> "FeatureMoments":
        """The moments of all processes' vectors together; every process must ask."""
        total = FeatureMoments(len(self.sum))
        total.count, total.sum, total.outer = (
            sum_over_processes(own, device) for own in (self.count, self.sum, self.outer)
        )
        return total

    def gaussian(self) -> tuple[Tensor, Tensor]:
        """
        Mean `(dim,)` and unbiased covariance `(dim, dim)`.

        Raises:
            ValueError: for fewer than two vectors.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs two images or more, and there are {int(self.count)}.")
        mean = self.sum / self.count
        return mean, (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)

    def root(self) -> Tensor:
        """Symmetric square root of the covariance; kept, since one set of originals is compared with many others."""
        if self._root is None:
            self._root = _symmetric_root(self.gaussian()[1])
        return self._root


class Gaussian:
    """
    Mean `(dim,)` and covariance `(dim, dim)` that somebody else has measured; in a Fréchet distance, what
    `FeatureMoments` are.
    """

    def __init__(self, mean: Tensor, covariance: Tensor):
        self.mean, self.covariance = mean.double(), covariance.double()
        self._root: Tensor | None = None

    def gaussian(self) -> tuple[Tensor, Tensor]:
        return self.mean, self.covariance

    def root(self) -> Tensor:
        """Symmetric square root of the covariance; kept."""
        if self._root is None:
            self._root = _symmetric_root(self.covariance)
        return self._root


def _symmetric_root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(first: FeatureMoments | Gaussian, second: FeatureMoments | Gaussian) -> float:
    r"""
    Squared Fréchet distance of the two Gaussians (https://huggingface.co/papers/1706.08500):

        |μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁^½ Σ₂ Σ₁^½)^½).

    The symmetric form of the root has real eigenvalues even where the covariances are singular, which they are with
    fewer images than features.
    """
    (mean, covariance), (other_mean, other) = first.gaussian(), second.gaussian()
    root = first.root()
    overlap = torch.linalg.eigvalsh(root @ other @ root).clamp(min=0).sqrt().sum()
    return float((mean - other_mean).square().sum() + covariance.trace() + other.trace() - 2 * overlap)


def inception_score(logits: Tensor, splits: int = 10, seed: int = 2020) -> tuple[float, float]:
    """
    exp(mean KL(p(y|x) ‖ p(y))) over `splits` parts of the shuffled images (https://huggingface.co/papers/1606.03498);
    shuffle and parts are torch-fidelity's.

    Args:
        logits (`Tensor` of shape `(N, classes)`): In the order of the dataset.

    Returns:
        `(float, float)`: Mean and standard deviation over the parts.

    Raises:
        ValueError: for fewer images than parts.
    """
    if len(logits) < splits:
        raise ValueError(f"an Inception score of {splits} parts needs as many images, and there are {len(logits)}.")
    log_p = logits[np.random.RandomState(seed).permutation(len(logits))].double().log_softmax(dim=1)
    bounds = [part * len(logits) // splits for part in range(splits + 1)]
    scores = []
    for start, stop in zip(bounds, bounds[1:], strict=False):
        part = log_p[start:stop]
        marginal = part.exp().mean(dim=0).log()
        scores.append((part.exp() * (part - marginal)).sum(dim=1).mean().exp())
    scores = torch.stack(scores)
    return float(scores.mean()), float(scores.std(correction=0))


class InceptionFeatures(nn.Module):
    """
    Inception-v3 as FID is defined on it. Frozen; always in eval mode.

    Args:
        weights_path (`str`, *optional*): torch-fidelity's `weights-inception-2015-12-05-6726825d.pth`. Default: torch
            hub's cache, or the download.

    Raises:
        FileNotFoundError: if the weights, or torch-fidelity, cannot be had. It says what to do.
        ValueError: if the file holds something else.
    """

    def __init__(self, weights_path: str | None = None):
        super().__init__()
        if importlib.util.find_spec("torch_fidelity") is None:
            raise FileNotFoundError("rFID and rIS need torch-fidelity: `pip install torch-fidelity`.")
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

        file = _download(URL_INCEPTION_V3) if weights_path is None else Path(weights_path)
        if not file.is_file():
            raise FileNotFoundError(f"Inception weights: no file at {str(weights_path)!r}.")
        try:
            torch.load(file, weights_only=True, map_location="meta")  # torch-fidelity would unpickle anything
            self.network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(file))
        except Exception as error:  # not a torch file, or a pickle of more than tensors, or other tensors
            message = str(error).splitlines()[0]
            raise ValueError(f"{file} does not hold torch-fidelity's Inception weights: {message}") from error

    def train(self, mode: bool = True) -> "InceptionFeatures":
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Images `(B, 3, H, W)` in [-1, 1], rounded to 8 bits, to features `(B, 2048)` and logits `(B, 1008)`."""
        return self.network(to_bytes(pixels))

    @torch.no_grad()
    def with_spatial(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """
        `forward`, and spatial features `(B, 2023)` for sFID (https://huggingface.co/papers/2103.03841): the first 7
        channels of the layer that TensorFlow's Inception calls `mixed_6/conv`, 17x17, channels last.
        """
        kept: list[Tensor] = []
        handle = self.network.Mixed_6d.branch1x1.register_forward_hook(lambda *call: kept.append(call[2]))
        try:
            features, logits = self(pixels)
        finally:
            handle.remove()
        return features, logits, kept[0][:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)


def to_bytes(pixels: Tensor) -> Tensor:
    """Pixels in about [-1, 1] to uint8, as a picture file would hold them."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def _download(url: str) -> Path:
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    if file.is_file():
        return file
    advice = f"Download {url} on a machine with internet access and pass its path (--inception_weights_path)."
    if constants.HF_HUB_OFFLINE:
        raise FileNotFoundError(f"Inception weights: {file} is not there, and HF_HUB_OFFLINE is set. {advice}")
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # a firewall that drops packets would otherwise hold the run for minutes
    try:
        torch.hub.load_state_dict_from_url(url, map_location="cpu", progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(f"Inception weights: {error}. {advice}") from error
    finally:
        socket.setdefaulttimeout(patience)
    return file
