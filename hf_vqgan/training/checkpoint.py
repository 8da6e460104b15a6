"""What a checkpoint holds: the state of every part of a run, tensors in safetensors and the rest in JSON, no pickle."""

import codecs
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..files.documents import read_json

STATE_FILE = "state.json"
FORMAT = 1


class Part(Protocol):
    """A part of a run. Its state is made of tensors, numbers, strings, None, and lists, tuples and dicts of these."""

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


# ---------------------------------------------------------------------------------------------------------------------
# Parts whose own state_dict is not what a checkpoint should hold


class NamedOptimizer:
    """
    An optimizer's state with parameters by name, where PyTorch numbers them.

    Args:
        networks (`nn.Module`, by name): Those whose parameters it has.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, **networks: nn.Module):
        known = {
            id(parameter): f"{network}.{name}"
            for network, module in networks.items()
            for name, parameter in module.named_parameters()
        }
        self.optimizer = optimizer
        self.parameters = {known[id(p)]: p for group in optimizer.param_groups for p in group["params"]}

    def state_dict(self) -> dict:
        return self.by_name(self.optimizer.state_dict())

    def by_name(self, state: dict) -> dict:
        names = list(self.parameters)
        groups = [group | {"params": [names[number] for number in group["params"]]} for group in state["param_groups"]]
        return {"state": {names[number]: memory for number, memory in state["state"].items()}, "groups": groups}

    def load_state_dict(self, state: dict) -> None:
        numbers = {name: number for number, name in enumerate(self.parameters)}
        if {name for group in state["groups"] for name in group["params"]} != numbers.keys():
            raise ValueError("it trains other parameters")
        for name, memory in state["state"].items():
            _require_moments_like(name, memory, self.parameters[name])
        groups = [group | {"params": [numbers[name] for name in group["params"]]} for group in state["groups"]]
        memories = {numbers[name]: memory for name, memory in state["state"].items()}
        self.optimizer.load_state_dict({"state": memories, "param_groups": groups})
        # Fused steps go through parameter and moments in the order of memory, which files do not keep.
        for parameter in self.parameters.values():
            memory = self.optimizer.state.get(parameter, {})
            for key, value in memory.items():
                if torch.is_tensor(value) and value.shape == parameter.shape:
                    memory[key] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def _require_moments_like(name: str, memory: dict, parameter: Tensor) -> None:
    for key in ("exp_avg", "exp_avg_sq"):
        if key in memory and memory[key].shape != parameter.shape:
            raise ValueError(f"{name}.{key} has shape {tuple(memory[key].shape)} instead of {tuple(parameter.shape)}")


class NamedAverages:
    """The moving averages of a network's parameters, by name."""

    def __init__(self, ema: EMAModel, network: nn.Module):
        self.ema, self.names = ema, [name for name, _ in network.named_parameters()]

    def state_dict(self) -> dict:
        return self.by_name(self.ema.state_dict())

    def by_name(self, state: dict) -> dict:
        return state | {"shadow_params": dict(zip(self.names, state["shadow_params"], strict=True))}

    def load_state_dict(self, state: dict) -> None:
        own = self.ema.shadow_params  # filled in place: on their device, in their order of memory
        for name, average in zip(self.names, own, strict=True):
            average.copy_(state["shadow_params"][name])
        self.ema.load_state_dict(state | {"shadow_params": own})


class LossScale:
    """The scale of losses under fp16. A run that goes on in another precision starts it anew, or drops it."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator

    def state_dict(self) -> dict:
        scaler = self.accelerator.scaler
        return {} if scaler is None else scaler.state_dict()

    def load_state_dict(self, state: dict) -> None:
        if self.accelerator.scaler is not None and state:
            self.accelerator.scaler.load_state_dict(state)


class RandomState:
    """The generators of all processes, which ask for their state together: Python's, numpy's, PyTorch's."""

    def __init__(self, accelerator: Accelerator):
        self.process, self.device = str(accelerator.process_index), accelerator.device

    def state_dict(self) -> dict:
        version, numbers, gauss = random.getstate()
        numpy_state: Any = np.random.get_state(legacy=False)
        key = numpy_state["state"]["key"].tolist()
        mine = {
            "python": [version, list(numbers), gauss],
            "numpy": numpy_state | {"state": numpy_state["state"] | {"key": key}},
            "torch": torch.get_rng_state(),
        }
        if self.device.type != "cpu":
            mine["device"] = torch.get_device_module(self.device).get_rng_state()
        return {str(process): state for process, state in enumerate(gather_object([mine]))}

    def load_state_dict(self, state: dict) -> None:
        mine = state.get(self.process)
        if mine is None:  # there are more processes than before, and the new ones keep their fresh seeds
            return
        version, numbers, gauss = mine["python"]
        random.setstate((version, tuple(numbers), gauss))
        inner = mine["numpy"]["state"]
        np.random.set_state(mine["numpy"] | {"state": inner | {"key": np.array(inner["key"], dtype=np.uint32)}})
        torch.set_rng_state(mine["torch"])
        if self.device.type != "cpu" and "device" in mine:
            torch.get_device_module(self.device).set_rng_state(mine["device"])


# ---------------------------------------------------------------------------------------------------------------------
# All parts


def collect_states(parts: dict[str, Part], accelerator: Accelerator) -> dict[str, dict]:
    """The states of all parts, and the random states of all processes, which call this together."""
    return {name: part.state_dict() for name, part in (parts | {"random": RandomState(accelerator)}).items()}


def restore_states(parts: dict[str, Part], states: dict[str, dict], accelerator: Accelerator) -> None:
    """
    Put all parts and this process's random generators into the states of a checkpoint.

    Raises:
        ValueError: if a part is missing or has other contents than this run's; the run is not to be used then.
    """
    # Random states last: nothing that is loaded can draw from them then.
    for name, part in (parts | {"random": RandomState(accelerator)}).items():
        if name not in states:
            raise ValueError(f"it has no {name!r}, which this run has: it is of a run with other settings.")
        try:
            _require_alike(part.state_dict(), states[name])
            part.load_state_dict(states[name])
        except Exception as error:  # what a wrong state does to a part, each part knows for itself
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"{name!r} does not fit this run ({reason}).") from error


def _require_alike(own: Any, saved: Any, path: str = "") -> None:
    """Where both have a value, it has to be of one kind: a tensor of that shape and type, a whole number, a text..."""
    if isinstance(own, dict):
        for key in own.keys() & saved.keys():
            _require_alike(own[key], saved[key], f"{path}.{key}")
    elif isinstance(own, Tensor):
        if (own.shape, own.dtype) != (saved.shape, saved.dtype):
            raise ValueError(f"{path}: {saved.dtype} {tuple(saved.shape)} instead of {own.dtype} {tuple(own.shape)}")
    elif own is not None and saved is not None:
        allowed = (int, float) if type(own) is float else type(own)
        if not isinstance(saved, allowed) or isinstance(saved, bool) != isinstance(own, bool):
            raise ValueError(f"{path}: a {type(saved).__name__} instead of a {type(own).__name__}")


def write_states(folder: Path, states: dict[str, dict]) -> None:
    """state.json, and NAME.safetensors for each state with tensors in it."""
    described = {}
    for name, state in states.items():
        tensors: dict[str, Tensor] = {}
        described[name] = _describe(state, "", tensors)
        if tensors:
            save_file(dict(_unshared(tensors)), folder / f"{name}.safetensors")
    text = json.dumps({"format": FORMAT, "states": described}, allow_nan=False)
    (folder / STATE_FILE).write_text(text, encoding="utf-8")


def read_states(folder: Path) -> dict[str, dict]:
    """
    What `write_states` wrote.

    Raises:
        ValueError: if it is not that.
    """
    try:
        document = read_json(folder / STATE_FILE)
        if document["format"] != FORMAT:
            raise ValueError(f"{STATE_FILE} has format {document['format']!r}, and this version reads {FORMAT}")
        states = {}
        for name, described in document["states"].items():
            file = folder / f"{name}.safetensors"
            states[name] = _restore(described, load_file(file) if file.is_file() else {})
        return states
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise ValueError(f"it cannot be read ({type(error).__name__}: {error}).") from error


def read_accelerate_states(folder: Path, parts: dict[str, Part]) -> dict[str, dict]:
    """
    A checkpoint as it was written before there was `write_states`: by Accelerate, most of it as pickles, of which only
    tensors and plain values are taken; no code in them is run.

    Args:
        parts (`dict[str, Part]`): In the order in which they were prepared and registered.

    Raises:
        ValueError: if it is not that, or a pickle asks for anything else.
    """
    networks = [name for name, part in parts.items() if isinstance(part, nn.Module)]
    files = {name: f"model{f'_{number}' if number else ''}.safetensors" for number, name in enumerate(networks)}
    files |= {"loss_scale": "scaler.pt"} | (
        {"optimizer": "optimizer.bin"} if (folder / "optimizer.bin").is_file() else {}
    )
    registered = [name for name in parts if name not in files]
    files |= {name: f"custom_checkpoint_{number}.pkl" for number, name in enumerate(registered)}
    states: dict[str, dict] = {}
    try:
        for name, part in parts.items():
            file = folder / files[name]
            if name == "loss_scale" and not file.is_file():
                states[name] = {}
            else:
                state = load_file(file) if file.suffix == ".safetensors" else _unpickle_values(file)
                states[name] = part.by_name(state) if isinstance(part, (NamedOptimizer, NamedAverages)) else state
        processes = sorted(folder.glob("random_states_*.pkl"))
        states["random"] = {file.stem.split("_")[-1]: _random_state_of(_unpickle_values(file)) for file in processes}
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        raise ValueError(f"it cannot be read ({type(error).__name__}: {error}).") from error
    return states


def _unpickle_values(file: Path) -> Any:
    arrays = [np.ndarray, np.dtype, np.dtypes.UInt32DType, np.array(0).__reduce__()[0], codecs.encode]
    try:
        with torch.serialization.safe_globals(arrays):
            return torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:  # a damaged pickle can fail in any way
        raise ValueError(f"{file.name} is damaged or holds more than tensors and numbers: {error}") from error


def _random_state_of(saved: dict) -> dict:
    """Accelerate's random states of a process as `RandomState` has them."""
    version, numbers, gauss = saved["random_state"]
    on_device = {}
    if torch.cuda.is_available() and "torch_cuda_manual_seed" in saved:
        on_device = {"device": saved["torch_cuda_manual_seed"][torch.cuda.current_device()]}
    _, key, position, has_gauss, numpy_gauss = saved["numpy_random_seed"]
    return {
        "python": [version, list(numbers), gauss],
        "numpy": {
            "bit_generator": "MT19937",
            "state": {"key": key.tolist(), "pos": position},
            "has_gauss": has_gauss,
            "gauss": numpy_gauss,
        },
        "torch": saved["torch_manual_seed"],
        **on_device,
    }


def _unshared(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors as safetensors wants them: contiguous, in memory of their own."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        address = tensor.untyped_storage().data_ptr()
        yield name, tensor.clone() if address in seen else tensor
        seen.add(address)


# JSON has neither tensors nor tuples, nor numbers as keys, nor infinity: each is an object with one of these keys.
TENSOR, TUPLE, ITEMS, FLOAT = "$tensor", "$tuple", "$items", "$float"


def _describe(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON, with its tensors moved to `tensors`."""
    if isinstance(value, Tensor):
        tensors[path] = value
        return {TENSOR: path}
    if isinstance(value, dict):
        items = [(key, _describe(item, f"{path}.{key}".lstrip("."), tensors)) for key, item in value.items()]
        plain = all(isinstance(key, str) and not key.startswith("$") for key in value)
        return dict(items) if plain else {ITEMS: items}
    if isinstance(value, (list, tuple)):
        items = [_describe(item, f"{path}.{number}", tensors) for number, item in enumerate(value)]
        return {TUPLE: items} if isinstance(value, tuple) else items
    if isinstance(value, float) and not math.isfinite(value):
        return {FLOAT: str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{path}: a checkpoint cannot hold a {type(value).__name__}.")


def _restore(value: Any, tensors: dict[str, Tensor]) -> Any:
    """What `_describe` was given."""
    if isinstance(value, list):
        return [_restore(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"$tensor": path}:
            return tensors[path]
        case {"$tuple": items}:
            return tuple(_restore(item, tensors) for item in items)
        case {"$items": items}:
            return {key: _restore(item, tensors) for key, item in items}
        case {"$float": text}:
            return float(text)
    return {key: _restore(item, tensors) for key, item in value.items()}
