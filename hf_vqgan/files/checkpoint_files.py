"""Reading other projects' checkpoint files: finding them and what they hold, without running code from them.

Tensors are mapped from the file on demand, so that only those in use take memory.
"""

import json
import re
import reprlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import huggingface_hub
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .sources import check_source, where_model_is
from .torch_files import Opaque, StoredTensor, read_torch_file

# In a folder, the first of these that exists is taken; otherwise the only file with a known ending.
WEIGHT_NAMES = (
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model.safetensors",
    *("model.ckpt", "last.ckpt", "vq.pt", "model.pt"),
)
WEIGHT_ENDINGS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
CONFIG_NAMES = ("config.json", "config.yaml", "model.yaml")
MOST_CONFIG_BYTES = 2**19
MOST_CONFIG_VALUES = 20_000
MOST_CONFIG_DEPTH = 50


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
        path_or_repo: A file; a folder; or `owner/name` on the Hub, optionally followed by a folder or file in it.

    Raises:
        FileNotFoundError: if it does not exist.
        ValueError: if a folder holds several candidates.
    """
    path = Path(path_or_repo)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise FileNotFoundError(f"{path_or_repo} is neither a file nor a folder.")
    if path.is_dir() and (elsewhere := where_model_is(path)):
        raise FileNotFoundError(f"{path_or_repo} is no tokenizer's folder. {elsewhere}")
    if path.exists():
        files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
        weights = path if path.is_file() else path / choose_weights([file.name for file in files], str(path))
        beside = [weights.parent / name for name in _config_names(weights)]
        return weights, next((file for file in beside if file.is_file() and file != weights), None)
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
    config = next((folder + name for name in _config_names(Path(chosen)) if folder + name in files), None)
    return weights, None if config is None else Path(huggingface_hub.hf_hub_download(repo, config))


def _config_names(weights: Path) -> tuple[str, ...]:
    return *CONFIG_NAMES, f"{weights.stem}.yaml", f"{weights.stem}.json"


def read_config(config: dict | str | Path | None) -> dict:
    """
    A JSON or YAML file, or a dict as it is; `{}` for none.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is neither JSON nor YAML, or larger, deeper or, with its aliases expanded, longer than any
            config.
    """
    if config is None:
        return {}
    if isinstance(config, dict):
        _check_extent(config, "config")
        return config
    if not isinstance(config, str | Path):
        raise ValueError(f"config is a {type(config).__name__}: expected a dict, or the path of a JSON or YAML file.")
    file = Path(config)
    if not file.is_file():
        raise FileNotFoundError(f"config {file}: no such file.")
    if file.stat().st_size > MOST_CONFIG_BYTES:
        raise ValueError(f"config {file} has {file.stat().st_size} bytes, expected at most {MOST_CONFIG_BYTES}.")
    try:
        text = file.read_text(encoding="utf-8-sig")
        values = json.loads(text) if file.suffix == ".json" else yaml.load(text, Loader=_ConfigLoader)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError) as error:  # what the parsers raise
        kind = "JSON" if file.suffix == ".json" else "YAML or JSON"
        raise ValueError(f"config {file} is not {kind}: {plain(str(error))}") from error
    except RecursionError as error:
        raise ValueError(f"config {file} is nested deeper than {MOST_CONFIG_DEPTH} levels.") from error
    if not isinstance(values, dict):
        raise ValueError(f"config {file}: expected names and values, found a {type(values).__name__}.")
    _check_extent(values, f"config {file}")
    return values


def _check_extent(values: dict, source: str) -> None:
    """
    Refuse configs that explode when traversed or printed: in a few lines, YAML's aliases can repeat a part a billion
    times or nest it in itself.
    """
    parts: list[tuple[Any, int]] = [(values, 1)]
    count = 0
    while parts:
        part, depth = parts.pop()
        count += 1
        if count > MOST_CONFIG_VALUES:
            raise ValueError(f"{source} holds more than {MOST_CONFIG_VALUES} values with its aliases written out.")
        if depth > MOST_CONFIG_DEPTH:
            raise ValueError(f"{source} is nested deeper than {MOST_CONFIG_DEPTH} levels.")
        if isinstance(part, dict):
            parts.extend((value, depth + 1) for value in part.values())
        elif isinstance(part, list | tuple):
            parts.extend((value, depth + 1) for value in part)


class _ConfigLoader(yaml.SafeLoader):
    """Reads 1e-8 as a number, as JSON and OmegaConf do; PyYAML alone expects 1.0e-8 and would give a string."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merges (`<<: *alias`) copy mappings, possibly a billion times."""
        super().flatten_mapping(node)
        if len(node.value) > MOST_CONFIG_VALUES:
            raise yaml.YAMLError(f"one mapping has more than {MOST_CONFIG_VALUES} entries")


_ConfigLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 200


def shown(value: Any) -> str:
    """The `repr` of a value for a message, always short."""
    return _short.repr(value)


def plain(text: str) -> str:
    """A name from a file for a message: quoted and cut if it is long or not printable."""
    return text if text.isprintable() and len(text) < 200 else shown(text)


def listed(names: Iterable[str], most: int = 8) -> str:
    """Names from a file for a message, the first `most` of them."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(plain, names[:most])) + more


def read_checkpoint(file: Path, containers: tuple[str, ...] = ("state_dict", "model")) -> Checkpoint:
    """
    Open a checkpoint: safetensors, torch (zip or older), or the index of a sharded one.

    Args:
        containers: Entries of a training file that may hold the state dict, the preferred one first.

    Raises:
        ValueError: for a damaged file, one that would run code, or one without a state dict.
    """
    if file.name.endswith(".index.json"):
        return _read_shards(file, containers)
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    try:
        opened = read_torch_file(file)
    except ValueError as error:
        _damaged(file, error)
    if opened.refused:
        raise ValueError(
            f"{file} was not loaded: its pickle calls for {listed(sorted(opened.refused))}, and running that could do "
            "anything. Only tensors and the bookkeeping of known trainers are read. If you trust the file, load it "
            "yourself, save its state dict with safetensors and convert that."
        )
    content, container = _unwrapped(opened.content, containers, str(file))
    shapes = {name: tensor.shape for name, tensor in content.items()}
    return Checkpoint(str(file), shapes, lambda name: opened.load(content[name]), container)


def _unwrapped(content: Any, containers: tuple[str, ...], source: str) -> tuple[dict[str, StoredTensor], str | None]:
    """The state dict inside the content of a training file, and the entry that held it."""
    container = None
    for _ in range(10):  # wrappers can be nested, and a dict can even be in itself
        inner = [name for name in containers if isinstance(content, dict) and isinstance(content.get(name), dict)]
        if not inner:
            break
        container = inner[0]
        content = content[container]
    if not isinstance(content, dict):
        kind = content.kind if isinstance(content, Opaque) else f"a {type(content).__name__}"
        raise ValueError(f"{source} holds {plain(kind)}, not a state dict.")
    if unnamed := [key.kind for key in content if not isinstance(key, str)]:
        raise ValueError(f"{source} holds no state dict: {plain(unnamed[0])} stands where a tensor's name should.")
    others = {name: value for name, value in content.items() if not isinstance(value, StoredTensor)}
    if others:
        kinds = {value.kind for value in others.values() if isinstance(value, Opaque)}
        raise ValueError(
            f"{source} holds no state dict: {', '.join(map(shown, list(others)[:8]))} are not tensors"
            + (f" but {listed(sorted(kinds), 3)}" if kinds else "")
            + f", and none of the entries {', '.join(containers)} is a dict."
        )
    return content, container


def _damaged(file: Path, error: Exception) -> NoReturn:
    raise ValueError(
        f"{file} is damaged, incomplete or no checkpoint ({file.stat().st_size} bytes): {plain(str(error))}. "
        "Download it again, or give the file that holds the weights."
    ) from error


def _read_safetensors(file: Path) -> Checkpoint:
    try:
        handle = safe_open(file, framework="pt")
        shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        _damaged(file, error)
    return Checkpoint(str(file), shapes, handle.get_tensor)


def _shards(index: Path) -> dict[str, str]:
    """
    The file of each tensor.

    Raises:
        ValueError: if `index` has no such list, or names a file outside its own folder, which must not be read.
    """
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{index} is not the index of a sharded checkpoint: it has no 'weight_map'.") from error
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise ValueError(f"{index}: its 'weight_map' must give the name of a file for each tensor.")
    for shard in set(places.values()):
        if Path(shard).name != shard or not shard.endswith(WEIGHT_ENDINGS):
            raise ValueError(
                f"{index} names the shard {shown(shard)}: expected the name of a file beside it that ends in "
                f"{', '.join(WEIGHT_ENDINGS)}. Nothing was read."
            )
    return places


def _read_shards(index: Path, containers: tuple[str, ...]) -> Checkpoint:
    places = _shards(index)
    shards = sorted(set(places.values()))
    if absent := [shard for shard in shards if not (index.parent / shard).is_file()]:
        raise FileNotFoundError(f"{index} names shards that are not there: {listed(absent)}.")
    # In the Hub's cache the index and its shards are links to files of one other folder.
    folders = {index.parent.resolve(), index.resolve().parent}
    if outside := [shard for shard in shards if (index.parent / shard).resolve().parent not in folders]:
        raise ValueError(
            f"{index}: its shards {listed(outside)} are links out of the folder. Put the files themselves there."
        )
    parts = {shard: read_checkpoint(index.parent / shard, containers) for shard in shards}
    if lacking := [name for name, shard in places.items() if name not in parts[shard].shapes]:
        raise ValueError(f"{index} names tensors that its shards do not hold: {listed(lacking)}.")
    # Tensors that the index does not name are part of the checkpoint, too, and are not ignored
    places = {name: shard for shard in shards for name in parts[shard].shapes} | places
    shapes = {name: parts[shard].shapes[name] for name, shard in places.items()}
    return Checkpoint(str(index), shapes, lambda name: parts[places[name]].load(name))
