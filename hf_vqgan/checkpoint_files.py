"""Reading other projects' checkpoint files: where they are, what is in them, and nothing that they ask to be run.

Tensors are mapped from the file, not read: memory is spent on those that are used, when they are used.
"""

import json
import pickle
import re
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import huggingface_hub
import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .sources import check_source

# In a folder, the first of these that is there is taken; failing all, the only file with a known ending.
WEIGHT_NAMES = (
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.ckpt",
    "last.ckpt",
    "vq.pt",
)
WEIGHT_ENDINGS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
CONFIG_NAMES = ("config.json", "config.yaml", "model.yaml")


@dataclass
class Checkpoint:
    """
    Args:
        source (`str`): For messages.
        shapes (`dict[str, tuple]`): Shape of every tensor, by name.
        load (`Callable[[str], Tensor]`): Maps one tensor from the file.
        container (`str`, *optional*): The entry of the file that held the tensors, such as `"state_dict"`.
    """

    source: str
    shapes: dict[str, tuple[int, ...]]
    load: Callable[[str], Tensor]
    container: str | None = None


def locate(path_or_repo: str | Path) -> tuple[Path, Path | None]:
    """
    The weight file, or the index of a sharded one, and the config file beside it if there is one.

    Args:
        path_or_repo: A file; a folder; or `owner/name` on the Hub, which may go on with a folder or file in it.

    Raises:
        FileNotFoundError: if there is no such thing.
        ValueError: if a folder holds several files that could be meant.
    """
    path = Path(path_or_repo)
    if path.exists():
        files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
        weights = path if path.is_file() else path / choose_weights([file.name for file in files], str(path))
        names = (*CONFIG_NAMES, f"{weights.stem}.yaml", f"{weights.stem}.json")
        return weights, next((weights.parent / name for name in names if (weights.parent / name).is_file()), None)
    parts = str(path_or_repo).split("/")
    if path.is_absolute() or len(parts) < 2 or parts[0] in (".", ".."):
        raise FileNotFoundError(f"{path_or_repo}: no such file or folder, nor the owner/name of a Hub repository.")
    check_source(path_or_repo, repo="/".join(parts[:2]))
    return _download("/".join(parts[:2]), "/".join(parts[2:]))


def choose_weights(names: Iterable[str], where: str) -> str:
    """The weight file among the file names of one folder."""
    names = list(names)
    if known := [name for name in WEIGHT_NAMES if name in names]:
        return known[0]
    candidates = [name for name in names if name.endswith(WEIGHT_ENDINGS)]
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise FileNotFoundError(f"{where} holds no checkpoint: no file ends in {', '.join(WEIGHT_ENDINGS)}.")
    raise ValueError(f"{where} holds several checkpoints: {', '.join(candidates)}. Give the path of one of them.")


def _download(repo: str, inner: str) -> tuple[Path, Path | None]:
    files = huggingface_hub.HfApi().list_repo_files(repo)
    folder = "" if inner == "" else f"{inner}/"
    if inner in files:
        folder, chosen = inner[: inner.rfind("/") + 1], inner
    else:
        here = [file.removeprefix(folder) for file in files if file.startswith(folder)]
        chosen = folder + choose_weights([name for name in here if "/" not in name], f"{repo}/{inner}".rstrip("/"))
    weights = Path(huggingface_hub.hf_hub_download(repo, chosen))
    if chosen.endswith(".index.json"):
        for shard in sorted(set(_shards(weights).values())):
            huggingface_hub.hf_hub_download(repo, folder + shard)
    stem = Path(chosen).stem
    for name in (*CONFIG_NAMES, f"{stem}.yaml", f"{stem}.json"):
        if folder + name in files:
            return weights, Path(huggingface_hub.hf_hub_download(repo, folder + name))
    return weights, None


def read_config(config: dict | str | Path | None) -> dict:
    """A JSON or YAML file, or a dict as it is; `{}` for none."""
    if config is None or isinstance(config, dict):
        return config or {}
    file = Path(config)
    if not file.is_file():
        raise FileNotFoundError(f"config {file}: no such file.")
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), Loader=_ConfigLoader)  # JSON is YAML
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config {file} is neither YAML nor JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"config {file}: expected names and values, found a {type(values).__name__}.")
    return values


class _ConfigLoader(yaml.SafeLoader):
    """Reads 1e-8 as the number that it is in JSON and to OmegaConf. PyYAML wants 1.0e-8, and would give a string."""


_ConfigLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def read_checkpoint(file: Path, containers: tuple[str, ...] = ("state_dict", "model")) -> Checkpoint:
    """
    Open a checkpoint: safetensors, torch (zip or older), or the index of a sharded one.

    Args:
        containers: Entries of a training file that may hold the state dict, the preferred one first.

    Raises:
        ValueError: for a damaged file, one that wants code run, or one without a state dict.
    """
    if file.name.endswith(".index.json"):
        return _read_shards(file, containers)
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    content, container = _read_torch(file), None
    while isinstance(content, dict):  # wrappers can be nested
        entry = next((name for name in containers if isinstance(content.get(name), dict)), None)
        if entry is None:
            break
        content, container = content[entry], entry
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not a state dict.")
    others = [name for name, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(
            f"{file} holds no state dict: {_some(others)} are not tensors, and none of the entries "
            f"{', '.join(containers)} is a dict."
        )
    return Checkpoint(str(file), {name: tuple(value.shape) for name, value in content.items()}, content.get, container)


def _some(names: list, most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(name) for name in names[:most]) + more


def _damaged(file: Path, error: Exception) -> NoReturn:
    raise ValueError(
        f"{file} is damaged, incomplete or no checkpoint ({file.stat().st_size} bytes): {error}. Download it again."
    ) from error


def _read_safetensors(file: Path) -> Checkpoint:
    try:
        handle = safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        _damaged(file, error)
    shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
    return Checkpoint(str(file), shapes, handle.get_tensor)


def _shards(index: Path) -> dict[str, str]:
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is not the index of a sharded checkpoint: it has no 'weight_map'.") from error


def _read_shards(index: Path, containers: tuple[str, ...]) -> Checkpoint:
    places = _shards(index)
    if absent := sorted({shard for shard in places.values() if not (index.parent / shard).is_file()}):
        raise FileNotFoundError(f"{index} names shards that are not there: {', '.join(absent)}.")
    parts = {shard: read_checkpoint(index.parent / shard, containers) for shard in sorted(set(places.values()))}
    if lacking := [name for name, shard in places.items() if name not in parts[shard].shapes]:
        raise ValueError(f"{index} names tensors that its shards do not hold: {_some(lacking)}.")
    shapes = {name: parts[shard].shapes[name] for name, shard in places.items()}
    return Checkpoint(str(index), shapes, lambda name: parts[places[name]].load(name))


def _read_torch(file: Path) -> object:
    is_zip = zipfile.is_zipfile(file)
    if is_zip and any(name.endswith("/constants.pkl") for name in zipfile.ZipFile(file).namelist()):
        raise ValueError(f"{file} is a TorchScript program, which only runs. Save its state_dict() with torch.save.")
    options = {"map_location": "cpu", "mmap": is_zip}
    try:
        return torch.load(file, weights_only=True, **options)
    except pickle.UnpicklingError:
        pass  # more than tensors in it: see what
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        _damaged(file, error)
    refused: set[str] = set()
    failure, content = None, None
    try:
        content = torch.load(file, weights_only=False, pickle_module=_cautious_pickle(refused), **options)
    except Exception as error:  # a damaged pickle can fail in any way
        failure = error
    if refused:
        raise ValueError(
            f"{file} was not loaded: its pickle calls for {', '.join(sorted(refused))}, and running that could do "
            "anything. Only tensors and the bookkeeping of known trainers are read. If you trust the file, load it "
            "yourself, save its state dict with safetensors and convert that."
        )
    if failure is not None:
        _damaged(file, failure)
    return content


class _Inert:
    """Stands where a checkpoint holds an object of its trainer: takes whatever it is given and keeps nothing."""

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def _take(self, *args, **kwargs):
        pass

    __setstate__ = __setitem__ = append = extend = add = update = _take


# What a pickle may really use: the parts tensors and plain containers are made of, none of which runs anything.
REAL = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch._utils", "_rebuild_tensor"): torch._utils._rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
} | {
    (module, kind.__name__): kind
    for module in ("builtins", "__builtin__")
    for kind in (bool, bytearray, bytes, complex, dict, float, frozenset, int, list, set, str, tuple)
}
REAL["__builtin__", "long"] = int  # how torch.save, in Python 2's words, writes int
# Whose objects are bookkeeping, replaced by placeholders. Their code is neither imported nor run.
BOOKKEEPING = frozenset(
    {
        "argparse",
        "easydict",
        "lightning",
        "lightning_fabric",
        "lightning_utilities",
        "numpy",
        "omegaconf",
        "pathlib",
        "pytorch_lightning",
        "torchmetrics",
        "yacs",
    }
)
BOOKKEEPING_NAMES = frozenset(
    {
        ("_codecs", "encode"),
        ("collections", "defaultdict"),
        ("collections", "deque"),
        ("copyreg", "_reconstructor"),
        ("datetime", "datetime"),
        ("datetime", "timedelta"),
        ("typing", "Any"),
    }
)


def _cautious_pickle(refused: set[str]) -> types.SimpleNamespace:
    """
    What `torch.load` needs of a pickle module. Only names in `REAL` are resolved; all others become placeholders, and
    those that are not known bookkeeping are noted in `refused`.
    """

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str):
            if (module, name) in REAL:
                return REAL[module, name]
            if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
                return getattr(torch, name)
            if module.partition(".")[0] not in BOOKKEEPING and (module, name) not in BOOKKEEPING_NAMES:
                refused.add(f"{module}.{name}")
            return type(name, (_Inert,), {})

    return types.SimpleNamespace(
        __name__="cautious_pickle", Unpickler=Unpickler, load=lambda file, **options: Unpickler(file, **options).load()
    )
