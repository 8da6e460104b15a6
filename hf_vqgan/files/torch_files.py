"""Reading what torch.save wrote, without unpickling it.

A pickle is a program for a small stack machine, whose instructions may call anything. `PickleReader` is that machine
without the calls: it builds dicts, lists and tuples, notes where tensors are in the file, and puts an `Opaque` in place
of everything else. It imports nothing, calls nothing, and allocates no more than the file holds. (`pickle.Unpickler`
with a restricted `find_class` calls nothing either, but a few bytes can make it allocate gigabytes or hash for hours.)

Tensors are mapped from the file on demand.
"""

import math
import mmap
import pickletools
import re
import struct
import sys
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MOST_STEPS = 2_000_000  # instructions of a pickle: some seconds; checkpoints have tens of thousands
MOST_DIMENSIONS = 16
LONGEST_NAME = 1000

STORAGE_TYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
# What a checkpoint may name without being refused: parts of tensors, plain containers, trainers' bookkeeping. Only the
# few in `PickleReader._call` are understood; of the others, only the name is kept.
HARMLESS = re.compile(
    r"torch\.((cuda|sparse|storage)\.)*(\w+Storage|\w+Tensor|Tensor|Size|device)"
    r"|torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild_from_type_v2|torch\.nn\.parameter\.Parameter"
    r"|torch\.serialization\._get_layout|torch\.torch_version\.TorchVersion"
    r"|(builtins|__builtin__)\.(bool|bytearray|bytes|complex|dict|float|frozenset|int|list|long|set|slice|str|tuple)"
    r"|collections\.(Counter|OrderedDict|defaultdict|deque)|_codecs\.encode|copyreg\._reconstructor"
    r"|datetime\.(datetime|timedelta)|typing\.Any"
    r"|(argparse|easydict|lightning|lightning_fabric|lightning_utilities|numpy|omegaconf|pathlib|pytorch_lightning"
    r"|torchmetrics|yacs)\..*",
    re.DOTALL,
)


@dataclass(frozen=True, eq=False)
class Opaque:
    """Placeholder for an object of the pickle that is not read; `kind` describes it."""

    kind: str


@dataclass(frozen=True, eq=False)
class _Name(Opaque):
    """A class or function that the pickle names: `kind` is `module.name`."""


@dataclass(frozen=True, eq=False)
class _Storage:
    key: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """Where a tensor is: `shape`, and `strides` and `offset` in elements of `dtype`, in the storage named `key`."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


class PickleReader:
    """
    Reads one pickle from a stream of bytes.

    Attributes:
        refused (`set[str]`): What it names beyond `HARMLESS`: a class or function that unpickling would call.
        storages (`dict`): Storages that tensors refer to, by key.
    """

    # Instructions that put the value that follows them on the stack
    VALUES = frozenset((
        "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
        "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
        "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
    ))  # fmt: skip
    # Instructions that put a new object on the stack
    NEW: dict[str, Callable[[], Any]] = {
        "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
        "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": lambda: Opaque("set"),
    }  # fmt: skip
    # Instructions that take everything above the last mark from the stack
    TO_MARK = frozenset((
        "POP_MARK", "DICT", "LIST", "TUPLE", "FROZENSET", "APPENDS", "ADDITEMS", "SETITEMS", "INST", "OBJ",
    ))  # fmt: skip

    def __init__(self):
        self.refused: set[str] = set()
        self.storages: dict[str, _Storage] = {}
        self.steps = 0

    def read(self, stream) -> Any:
        """
        The object that the pickle at the stream's position describes.

        Raises:
            ValueError, LookupError, TypeError, AttributeError: if it is no valid pickle, or one beyond `MOST_STEPS`.
        """
        stack: list = []
        below: list[list] = []  # the stacks under each open mark
        memo: dict[int, Any] = {}

        for operation, argument, _ in pickletools.genops(stream):
            self._count(1)
            name = operation.name
            if name in self.TO_MARK:
                items, stack = stack, below.pop()
            match name:
                case _ if name in self.VALUES:
                    stack.append(argument)
                case _ if name in self.NEW:
                    stack.append(self.NEW[name]())
                case "PROTO" | "FRAME" | "POP_MARK":
                    pass
                case "STOP":
                    return stack.pop()
                case "MARK":
                    below.append(stack)
                    stack = []
                case "POP":
                    if stack:
                        stack.pop()
                    else:
                        stack = below.pop()
                case "DUP":
                    stack.append(stack[-1])
                case "PUT" | "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "GET" | "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "LIST":
                    stack.append(items)
                case "TUPLE":
                    stack.append(tuple(items))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    items = [stack.pop() for _ in range(int(name[-1]))]
                    stack.append(tuple(reversed(items)))
                case "DICT":
                    stack.append({})
                    self._set_items(stack[-1], items)
                case "FROZENSET":
                    stack.append(Opaque("frozenset"))
                case "APPEND":
                    self._append(stack[-2], [stack.pop()])
                case "APPENDS" | "ADDITEMS":
                    self._append(stack[-1], items)
                case "SETITEM":
                    value, key = stack.pop(), stack.pop()
                    self._set_items(stack[-1], [key, value])
                case "SETITEMS":
                    self._set_items(stack[-1], items)
                case "GLOBAL":
                    stack.append(self._name(*argument.split(" ", 1)))
                case "STACK_GLOBAL":
                    attribute, module = stack.pop(), stack.pop()
                    stack.append(self._name(module, attribute))
                case "REDUCE" | "NEWOBJ":
                    arguments, called = stack.pop(), stack.pop()
                    stack.append(self._call(called, arguments))
                case "NEWOBJ_EX":
                    _, arguments, called = stack.pop(), stack.pop(), stack.pop()
                    stack.append(self._call(called, arguments))
                case "INST":
                    stack.append(Opaque(self._name(*argument.split(" ", 1)).kind))
                case "OBJ":
                    called, *arguments = items
                    stack.append(self._call(called, tuple(arguments)))
                case "BUILD":
                    stack.pop()  # attributes: of a state dict its _metadata
                case "BINPERSID":
                    stack.append(self._storage(stack.pop()))
                case _:
                    raise ValueError(f"the instruction {name} does not occur in checkpoints")

    def _count(self, steps: int) -> None:
        self.steps += steps
        if self.steps > MOST_STEPS:
            raise ValueError(f"it describes more than {MOST_STEPS} objects")

    def _name(self, module: str, attribute: str) -> _Name:
        if not (isinstance(module, str) and isinstance(attribute, str) and len(module + attribute) <= LONGEST_NAME):
            raise ValueError("a class or function has no valid name")
        name = f"{module}.{attribute}"
        is_dtype = module == "torch" and isinstance(vars(torch).get(attribute), torch.dtype)
        if not (is_dtype or HARMLESS.fullmatch(name)):
            self.refused.add(name)
        return _Name(name)

    @staticmethod
    def _append(target: Any, items: list) -> None:
        if isinstance(target, list):
            target.extend(items)

    @staticmethod
    def _set_items(target: Any, items: list) -> None:
        if isinstance(target, dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                # Only text is looked up. Hashing others could take forever: colliding numbers, tuples of tuples of ...
                target[key if isinstance(key, str) else Opaque(f"a key of type {type(key).__name__}")] = value

    def _call(self, called: Any, arguments: Any) -> Any:
        """What calling `called` would give, if that is a container or a tensor."""
        kind = called.kind if isinstance(called, _Name) else type(called).__name__
        match kind.split(".")[-1], arguments:
            case ("OrderedDict", ()) | ("dict", ()):
                return {}
            case ("OrderedDict", (list(pairs),)):  # as Python 2 wrote it
                self._count(len(pairs))
                content: dict = {}
                self._set_items(content, [part for key, value in pairs for part in (key, value)])
                return content
            case "Size", (tuple(sizes),):
                return sizes
            case (("_rebuild_parameter" | "_rebuild_parameter_with_state"), (tensor, *_)):
                return tensor
            case (("_rebuild_tensor" | "_rebuild_tensor_v2"), (_Storage() as storage, offset, shape, strides, *_)):
                return self._tensor(storage, storage.dtype, offset, shape, strides)
            case "_rebuild_tensor_v3", (_Storage() as storage, offset, shape, strides, _, _, _Name(dtype), *_):
                dtype = vars(torch).get(dtype.removeprefix("torch."))
                return self._tensor(storage, dtype, offset, shape, strides)
            case "_rebuild_from_type_v2", (
                _Name(name) as function, _Name("torch.Tensor" | "torch.nn.parameter.Parameter"), inner, *_
            ) if name != kind:  # fmt: skip
                return self._call(function, inner)
        return Opaque(kind)

    def _storage(self, identity: Any) -> _Storage | Opaque:
        match identity:
            case ("storage", _Name(kind), str(key), _, int(count), *view) if view in ([], [None]):
                dtype = STORAGE_TYPES.get(kind.split(".")[-1])
                if dtype is None or not 0 <= count < 2**63:
                    return Opaque(kind)
                storage = self.storages.setdefault(key, _Storage(key, dtype, count))
                if (storage.dtype, storage.count) != (dtype, count):
                    raise ValueError(f"storage {key!r:.50} is described in two ways")
                return storage
        raise ValueError("a reference to something that is no storage of a tensor")

    def _tensor(self, storage: _Storage, dtype: Any, offset: Any, shape: Any, strides: Any) -> StoredTensor | Opaque:
        """The tensor, or what is wrong with it, which matters only if it is one of the model's."""
        fits = len(shape) == len(strides) <= MOST_DIMENSIONS and isinstance(dtype, torch.dtype)
        if not (fits and all(isinstance(n, int) and 0 <= n < 2**63 for n in (offset, *shape, *strides))):
            return Opaque("a tensor of an impossible layout")
        stored = storage.count * storage.dtype.itemsize // dtype.itemsize
        elements = math.prod(shape)
        last = offset + sum((side - 1) * stride for side, stride in zip(shape, strides, strict=True))
        if elements > 0 and (last >= stored or elements > stored):
            return Opaque(f"a tensor of shape {tuple(shape)}, of which {stored} numbers are stored")
        return StoredTensor(storage.key, dtype, tuple(shape), tuple(strides), offset)


@dataclass
class TorchFile:
    """
    Args:
        content: What was saved, with [`StoredTensor`] for tensors and [`Opaque`] for other objects.
        refused: Classes and functions that it names and that are not known to be harmless.
        load: Maps a tensor from the file.
    """

    content: Any
    refused: set[str]
    load: Callable[[StoredTensor], Tensor]


def read_torch_file(file: Path) -> TorchFile:
    """
    Open what torch.save wrote, in its zip format or the one before.

    Raises:
        ValueError: if the file is damaged, or not one of these; the message says what is wrong with it.
    """
    try:
        with open(file, "rb") as stream:
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        read = _read_zip if data[:4] == b"PK\3\4" else _read_legacy
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of escapes in damaged text
            return read(file, data)
    except (
        # what Python's own parsers raise on garbage
        ValueError, LookupError, TypeError, AttributeError, EOFError, OverflowError, NotImplementedError, struct.error,
        zipfile.BadZipFile,
    ) as error:  # fmt: skip
        raise ValueError(str(error) or type(error).__name__) from error


def _read_zip(file: Path, data: mmap.mmap) -> TorchFile:
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    records = {entry.filename: entry for entry in entries}
    if any(name.endswith("/constants.pkl") for name in records):
        raise ValueError("it is a TorchScript program, which only runs. Save its state_dict() with torch.save")
    if len(records) < len(entries):
        raise ValueError("it holds several records of one name")
    if packed := [
        entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1
    ]:
        raise ValueError(
            f"its record {packed[0]!r:.50} is compressed, which torch.save never does. Save it again with torch"
        )
    (pickle_name,) = [name for name in records if name.endswith("/data.pkl")] or [None]
    if pickle_name is None:
        raise ValueError("it is a zip archive without the record data.pkl of torch.save")
    folder = pickle_name.removesuffix("data.pkl")

    def place(name: str) -> tuple[int, int]:
        """Where a record's bytes start, and how many there are."""
        if name not in records:
            raise ValueError(f"its record {name!r:.50} is missing")
        header, size = records[name].header_offset, records[name].file_size
        lengths = struct.unpack_from("<HH", data, header + 26)  # of the name and of the padding after it
        start = header + 30 + sum(lengths)
        if data[header : header + 4] != b"PK\3\4" or start + size > len(data):
            raise ValueError(f"its record {name!r:.50} lies beyond the end")
        return start, size

    if f"{folder}byteorder" in records:
        start, size = place(f"{folder}byteorder")
        if data[start : start + size] != sys.byteorder.encode():
            raise ValueError(f"its numbers are not {sys.byteorder}-endian. Save it again on a machine like this one")
    data.seek(place(pickle_name)[0])
    reader = PickleReader()
    content = reader.read(data)
    places = {key: place(f"{folder}data/{key}") for key in reader.storages}
    return _mapped(data, content, reader, places)


LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def _read_legacy(file: Path, data: mmap.mmap) -> TorchFile:
    """Five pickles (a magic number, a version, the machine, the content, the storages' keys), then the storages."""
    if PickleReader().read(data) != LEGACY_MAGIC or PickleReader().read(data) != 1001:
        raise ValueError("it does not begin as files of torch.save do")
    if PickleReader().read(data).get("little_endian") is not (sys.byteorder == "little"):
        raise ValueError(f"its numbers are not {sys.byteorder}-endian. Save it again on a machine like this one")
    reader = PickleReader()
    content = reader.read(data)
    places, start = {}, 0
    keys = PickleReader().read(data)
    start = data.tell()
    for key in keys:
        storage = reader.storages[key]
        (count,) = struct.unpack_from("<q", data, start)
        if count != storage.count:
            raise ValueError(f"its storage {key!r:.50} has {count} numbers, expected {storage.count}")
        places[key] = start + 8, count * storage.dtype.itemsize
        start += 8 + places[key][1]
    if missing := reader.storages.keys() - places.keys():
        raise ValueError(f"its storage {min(missing)!r:.50} is missing")
    if start < len(data):
        raise ValueError(f"{len(data) - start} bytes follow after its last storage")
    return _mapped(data, content, reader, places)


def _mapped(data: mmap.mmap, content: Any, reader: PickleReader, places: dict[str, tuple[int, int]]) -> TorchFile:
    """Check that every storage is where it should be; the result maps tensors from there."""
    for key, (start, size) in places.items():
        expected = reader.storages[key].count * reader.storages[key].dtype.itemsize
        if size != expected or start + size > len(data):
            held = max(0, min(size, len(data) - start))
            raise ValueError(f"its storage {key!r:.50} has {held} bytes, expected {expected}")

    def load(tensor: StoredTensor) -> Tensor:
        if 0 in tensor.shape:
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        start, size = places[tensor.key]
        count = size // tensor.dtype.itemsize
        stored = torch.frombuffer(data, dtype=tensor.dtype, count=count, offset=start)
        return stored.as_strided(tensor.shape, tensor.strides, tensor.offset)

    return TorchFile(content, reader.refused, load)
