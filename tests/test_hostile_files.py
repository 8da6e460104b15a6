"""
Files made to do harm: to run code, to hang, to take all memory, to read files that are not theirs, or to load as
something else than they hold. Each is refused by one error, or does none of that.
"""

import io
import json
import pickle
import struct
import time
import zipfile
from pathlib import Path

import pytest
import torch
from limits import limits
from original_models import Original
from safetensors.torch import load_file, save_file
from test_conversion import TAMING_TARGET, save_original

from hf_vqgan import VQGANModel
from hf_vqgan.files.checkpoint_files import read_checkpoint, read_config
from hf_vqgan.files.torch_files import MOST_STEPS, PickleReader


@pytest.fixture(autouse=True)
def limited():
    with limits(seconds=30, megabytes=1024):
        yield


# -------------------------------------------------------------------------------------------- pickles, by instruction

MARK, STOP, NONE, TUPLE, EMPTY_TUPLE, LIST = b"(", b".", b"N", b"t", b")", b"]"
REDUCE, BUILD, APPENDS, SETITEMS, DICT, GET_1 = b"R", b"b", b"e", b"u", b"}", b"h\x01"


def put(number: int) -> bytes:
    return b"q" + bytes([number])


def text(value: str) -> bytes:
    return b"X" + struct.pack("<i", len(value.encode())) + value.encode()


def whole(value: int) -> bytes:
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def called(module: str, name: str, *arguments: bytes) -> bytes:
    return f"c{module}\n{name}\n".encode() + MARK + b"".join(arguments) + TUPLE + REDUCE


def numbers(*values: int) -> bytes:
    return MARK + b"".join(map(whole, values)) + TUPLE


def storage(key: str = "0", kind: str = "FloatStorage", count: int = 4) -> bytes:
    return MARK + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + whole(count) + TUPLE + b"Q"


def tensor(where: bytes, offset: int, shape: bytes, strides: bytes) -> bytes:
    hooks = called("collections", "OrderedDict")
    return called("torch._utils", "_rebuild_tensor_v2", where, whole(offset), shape, strides, b"\x89", hooks)


def state_dict(**values: bytes) -> bytes:
    return b"\x80\x02" + DICT + MARK + b"".join(text(name) + value for name, value in values.items()) + SETITEMS + STOP


def write(file: Path, pickled: bytes, storages: dict[str, bytes] | None = None) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", b"3")
        for key, data in ({"0": bytes(16), "1": bytes(16)} if storages is None else storages).items():
            archive.writestr(f"archive/data/{key}", data)
    return file


GOOD = tensor(storage(), 0, numbers(2, 2), numbers(2, 1))


def test_what_the_crafted_pickles_are_made_of_is_read(tmp_path):
    file = write(tmp_path / "x.pt", state_dict(a=GOOD), {"0": struct.pack("<4f", 1, 2, 3, 4)})
    assert torch.equal(read_checkpoint(file).load("a"), torch.tensor([[1.0, 2], [3, 4]]))
    assert torch.equal(torch.load(file, weights_only=True)["a"], torch.tensor([[1.0, 2], [3, 4]]))


LAYOUTS = {
    "expanded": (tensor(storage(), 0, numbers(10**6, 10**6), numbers(0, 0)), "of which 4 numbers are stored"),
    "beyond": (tensor(storage(), 3, numbers(2), numbers(1)), "of which 4 numbers are stored"),
    "far beyond": (tensor(storage(), 0, numbers(2), numbers(2**62)), "of which 4 numbers are stored"),
    "backwards": (tensor(storage(), 3, numbers(2), numbers(-1)), "a tensor of an impossible layout"),
    "negative": (tensor(storage(), 0, numbers(-2), numbers(1)), "a tensor of an impossible layout"),
    "enormous": (tensor(storage(), 0, numbers(2**200), numbers(1)), "a tensor of an impossible layout"),
    "no numbers": (tensor(storage(), 0, MARK + text("2") + TUPLE, numbers(1)), "a tensor of an impossible layout"),
    "many sides": (tensor(storage(), 0, numbers(*[1] * 500), numbers(*[1] * 500)), "a tensor of an impossible layout"),
    "fewer strides": (tensor(storage(), 0, numbers(2, 2), numbers(1)), "a tensor of an impossible layout"),
    "no shape": (tensor(storage(), 0, NONE, numbers(1)), "is damaged, incomplete or no checkpoint"),
    "large storage": (tensor(storage("1", count=5), 0, numbers(2), numbers(1)), "'1' has 16 bytes, expected 20"),
    "huge storage": (tensor(storage("1", count=2**61), 0, numbers(2), numbers(1)), "has 16 bytes, expected"),
    "endless storage": (tensor(storage("1", count=2**900), 0, numbers(2), numbers(1)), "_rebuild_tensor_v2"),
    "negative storage": (tensor(storage("1", count=-4), 0, numbers(2), numbers(1)), "_rebuild_tensor_v2"),
    "two storages": (tensor(storage(count=3), 0, numbers(2), numbers(1)), "storage '0' is described in two ways"),
    "no storage": (tensor(storage(key="7"), 0, numbers(2), numbers(1)), "record 'archive/data/7' is missing"),
    "other place": (tensor(storage(key="../data.pkl"), 0, numbers(2), numbers(1)), "is missing"),
    "quantized": (tensor(storage("1", "QInt8Storage"), 0, numbers(2), numbers(1)), "_rebuild_tensor_v2"),
    "meta": (called("torch._utils", "_rebuild_meta_tensor_no_storage", numbers(2)), "_rebuild_meta_tensor_no_storage"),
    "bytes": (called("builtins", "bytearray", whole(10**12)), "builtins.bytearray"),
    "list": (called("builtins", "list", called("builtins", "bytes", whole(10**12))), "builtins.list"),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_impossible_tensors_are_refused(name, tmp_path):
    value, message = LAYOUTS[name]
    file = write(tmp_path / "x.pt", state_dict(a=GOOD, b=value))
    with pytest.raises(ValueError, match=message) as caught:
        read_checkpoint(file)
    assert str(file) in str(caught.value) and str(caught.value).isprintable()


def test_impossible_tensors_of_the_optimizer_do_not_matter(tmp_path):
    """Tensors that share numbers are legal, and beside the state dict none is looked at."""
    expanded = tensor(storage(), 0, numbers(10**6), numbers(0))
    file = write(tmp_path / "x.pt", state_dict(optimizer=expanded, state_dict=state_dict(a=GOOD)[2:-1]))
    assert read_checkpoint(file).shapes == {"a": (2, 2)}


REBUILD = b"ctorch._tensor\n_rebuild_from_type_v2\n"


def nested_tuples(depth: int) -> bytes:
    return EMPTY_TUPLE + b"\x85" * depth


BOMBS = {
    "memo": NONE + b"r" + struct.pack("<I", 2**32 - 1) + b"0",
    "tuples as key": DICT + nested_tuples(10**6) + NONE + b"s0",
    "tuples": nested_tuples(10**6) + b"0",
    "lists": LIST * 5 * 10**5 + b"a" * (5 * 10**5 - 1) + b"0",
    "dicts": (DICT + text("a")) * 10**5 + NONE + b"s" * 10**5 + b"0",
    "colliding keys": DICT + MARK + b"".join(whole(n * (2**61 - 1)) + NONE for n in range(10**5)) + SETITEMS + b"0",
    "doubling": LIST + put(1) + b"0" + (GET_1 + GET_1 + b"\x86" + put(1) + b"0") * 5000,
    "rebuilt in itself": LIST
    + put(1)
    + MARK
    + REBUILD
    + b"ctorch\nTensor\n"
    + GET_1
    + APPENDS
    + b"0"
    + (REBUILD + GET_1 + REDUCE + b"0") * 10,
    "many sides": numbers(*[1] * 10**5)
    + put(1)
    + b"0"
    + MARK
    + storage()
    + whole(0)
    + GET_1
    + GET_1
    + TUPLE
    + put(2)
    + b"0"
    + (b"ctorch._utils\n_rebuild_tensor\nh\x02" + REDUCE + b"0") * 10**5,
    "list in itself": LIST + put(1) + GET_1 + b"a0",
    "buffers": called("builtins", "bytearray", whole(10**12)) + b"0",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_do_not_go_off(name, tmp_path):
    """Each is a value that the pickle makes and drops again, beside a good state dict."""
    file = write(tmp_path / "x.pt", b"\x80\x02" + BOMBS[name] + state_dict(a=GOOD)[2:])
    began = time.monotonic()
    assert read_checkpoint(file).shapes == {"a": (2, 2)}
    assert time.monotonic() - began < 15


def test_pickles_without_end_end(tmp_path):
    file = write(tmp_path / "x.pt", b"\x80\x02" + LIST + put(1) + (GET_1 + b"0") * (MOST_STEPS // 2 + 1) + STOP)
    with pytest.raises(ValueError, match=f"describes more than {MOST_STEPS} objects"):
        read_checkpoint(file)
    # few instructions that copy much: an OrderedDict of a long list, again and again
    pairs = LIST + MARK + (text("a") + NONE + b"\x86") * 10_000 + APPENDS + put(1)
    again = b"ccollections\nOrderedDict\n" + GET_1 + b"\x85" + REDUCE + b"0"
    file = write(tmp_path / "x.pt", b"\x80\x02" + pairs + again * 10_000 + STOP)
    with pytest.raises(ValueError, match=f"describes more than {MOST_STEPS} objects"):
        read_checkpoint(file)


@pytest.mark.parametrize(
    "pickled",
    [
        b"", b"\x80\x02", STOP, b"0.", b"h\x09.", b"t.", b"\x80\x02}(X\xff\xff\xff\x7fa",
        b"\x8d" + b"\xff" * 7 + b"\x7f", b"\x95" + b"\xff" * 8, b"\x96" + b"\xff" * 7 + b"\x7f",
        b"I" + b"9" * 10_000 + b"\n.", b"Fx\n.", b"S'\\x'\n.", b"S'\\\x89'\n.",
        b"V\\ud800\n.",
        text("m" * 600) + text("n" * 600) + b"\x93.", b"\x82\x01.",
        b"\x97.", b"Pname\n.", b"cos\n.", b"NN\x93.", b"NR.", b"Nb.", b"(o.", b"}(NNNu.",
        b"\xff", b"\x80\xff.",
    ],
)  # fmt: skip
def test_broken_pickles_are_damaged_files(pickled, tmp_path):
    file = write(tmp_path / "x.pt", pickled)
    with pytest.raises(
        ValueError, match="is damaged, incomplete or no checkpoint|holds no state dict|not a state dict"
    ):
        read_checkpoint(file)


@pytest.mark.parametrize(
    "module, name",
    [
        ("os", "system"), ("builtins", "eval"), ("builtins", "getattr"), ("builtins", "__import__"), ("torch", "load"),
        ("torch.storage", "_load_from_bytes"), ("torch.hub", "load"), ("functools", "partial"), ("torch._utils", "x"),
        ("torch.nn.modules.linear", "Linear"), ("collections", "OrderedDict.__reduce__"), ("numpyx", "load"),
        ("torch", "FloatStorage.from_file"), ("torch.serialization", "load"), ("__main__", "Model"), ("", ""),
    ],
)  # fmt: skip
def test_names_that_could_do_something_are_refused_however_they_are_written(module, name, tmp_path):
    ways = (f"c{module}\n{name}\n".encode(), text(module) + text(name) + b"\x93", f"(i{module}\n{name}\n".encode())
    for way in ways:
        file = write(tmp_path / "x.pt", state_dict(a=GOOD, b=way))
        with pytest.raises(ValueError, match=r"calls for .*running that could do anything"):
            read_checkpoint(file)


def test_placeholders_take_no_orders(tmp_path, monkeypatch):
    """Bookkeeping by class and state, of packages that would run what they are given: nothing is imported or called."""
    monkeypatch.setattr("builtins.__import__", lambda name, *_: pytest.fail(f"imports {name}"))
    ran = f"c__builtin__\nset\n{MARK.decode()}".encode() + LIST + TUPLE + REDUCE
    orders = [
        called("numpy.f2py.diagnose", "run_command", text("touch ran")),
        called("pathlib", "Path", text("/")) + DICT + MARK + text("__reduce__") + ran + SETITEMS + BUILD,
        called("omegaconf", "OmegaConf.create", text("x")) + MARK + NONE + DICT + TUPLE + BUILD,
        called("copyreg", "_reconstructor", ran, NONE, NONE),
        called("torch._tensor", "_rebuild_from_type_v2", b"cnumpy\nload\n", b"ctorch\nTensor\n", ran + b"\x85", NONE),
    ]
    reader = PickleReader()
    names = {f"x{number}": order for number, order in enumerate(orders)}
    content = reader.read(io.BytesIO(state_dict(**names)))
    assert not reader.refused and len(content) == len(orders)
    assert all(type(value).__name__ == "Opaque" for value in content.values())


# --------------------------------------------------------------------------------------------------- files around them


def test_compressed_records_are_refused_unopened(tmp_path):
    """1 GB of zeros in 1 MB; torch maps records from the file, and would take compressed weights for numbers."""
    for name in ("archive/data.pkl", "archive/data/0"):
        with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
            archive.writestr("archive/data.pkl" if name.endswith("0") else "archive/data/0", state_dict(a=GOOD))
            with archive.open(_deflated(name), "w") as stream:
                for _ in range(64):
                    stream.write(bytes(2**20))
        with pytest.raises(ValueError, match=f"record '{name}' is compressed, which torch.save never does"):
            read_checkpoint(tmp_path / "x.pt")


def _deflated(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.compress_type = zipfile.ZIP_DEFLATED
    return info


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_ambiguous_and_foreign_archives(tmp_path):
    file = write(tmp_path / "x.pt", state_dict(a=GOOD))
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("archive/data/0", bytes(16))
    with pytest.raises(ValueError, match="several records of one name"):
        read_checkpoint(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("text", b"x")
    with pytest.raises(ValueError, match=r"without the record data\.pkl"):
        read_checkpoint(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", state_dict(a=GOOD))
        archive.writestr("archive/byteorder", b"big")
    with pytest.raises(ValueError, match="not little-endian"):
        read_checkpoint(file)


def test_old_format(tmp_path):
    """Before zip: every storage must be where the pickle says, and as long."""
    file = tmp_path / "x.pt"
    values = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.tensor([True, False]), "c": torch.zeros(0, 3)}
    torch.save(values, file, _use_new_zipfile_serialization=False)
    opened = read_checkpoint(file)
    assert all(torch.equal(opened.load(name), value) for name, value in values.items())
    data = file.read_bytes()
    for damaged in (
        data[:-1],
        data[:-30],
        data[:100],
        b"N." + data,
        data.replace(b"FloatStorage", b"HalfStorage"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged, incomplete or no checkpoint"):
            read_checkpoint(file)
    file.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match=r"does not begin as files of torch\.save do"):
        read_checkpoint(file)


def test_state_dict_in_itself(tmp_path):
    circle: dict = {}
    circle["state_dict"] = circle
    torch.save(circle, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="holds no state dict: 'state_dict' are not tensors"):
        VQGANModel.from_original(tmp_path / "x.ckpt")


# ----------------------------------------------------------------------------------------------------- numbers in names


@pytest.mark.parametrize("number", ["999999999", "9" * 40, "4000", "-1", "²", "٣", "01", "1e9"])
@pytest.mark.parametrize("name", ["encoder.down.{}.block.0.conv1.weight", "decoder.up.0.attn.{}.q.weight"])
def test_numbers_in_names_are_no_sizes(number, name, tmp_path):
    extra = {name.format(number): torch.zeros(32, 32, 3, 3)}
    folder = save_original(Original(), tmp_path, TAMING_TARGET, "state_dict", **extra)
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"1 surplus: (encoder|decoder)\."):
        VQGANModel.from_original(folder)
    assert time.monotonic() - began < 10


def test_more_levels_than_any_tokenizer_has(tmp_path):
    for name in ("encoder.down.{}.block.0.norm1.bias", "encoder.down.0.block.{}.norm1.bias"):
        tensors = Original().state_dict() | {name.format(number): torch.zeros(32) for number in range(1000)}
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=r"counts to 999, and no known tokenizer has over (12|32)\."):
            VQGANModel.from_original(tmp_path, config=TAMING_TARGET)


def test_tensors_without_elements_are_no_sizes(tmp_path):
    """10^9 x 10^9 x 3 x 3 weights have more bytes than PyTorch can count."""
    extra = {name: torch.zeros(10**9, 0, 3, 3) for name in ("encoder.conv_out.weight", "decoder.conv_out.weight")}
    extra |= {f"encoder.down.{level}.block.0.conv2.weight": torch.zeros(10**9, 0, 3, 3) for level in range(3)}
    folder = save_original(Original(), tmp_path, TAMING_TARGET, "state_dict", **extra)
    with pytest.raises(ValueError, match=r"is \(1000000000, 0, 3, 3\), and no known tokenizer has sides over 67108864"):
        VQGANModel.from_original(folder)


def test_names_cannot_spoil_the_message(tmp_path):
    extra = {"encoder.\x1b[2J\n" + "x" * 10**6: torch.zeros(1)}
    folder = save_original(Original(), tmp_path, TAMING_TARGET, "state_dict", **extra)
    with pytest.raises(ValueError, match="1 surplus: ") as caught:
        VQGANModel.from_original(folder)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


# ------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e30])
def test_weights_that_are_no_numbers(value, tmp_path):
    original = Original()
    original.decoder.conv_in.bias.data[2] = value
    folder = save_original(original, tmp_path, TAMING_TARGET, "state_dict")
    with pytest.raises(ValueError, match=r"tensors hold NaN, .*: decoder\.conv_in\.bias\. The file"):
        VQGANModel.from_original(folder)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_weights_of_other_types(dtype, tmp_path):
    tensors = Original().state_dict()
    name = "decoder.conv_in.bias"
    tensors[name] = tensors[name].to(dtype)
    torch.save(tensors, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=rf"{name} is {dtype}\. Expected weights in float16"):
        VQGANModel.from_original(tmp_path, config=TAMING_TARGET)


@pytest.mark.parametrize("used", [torch.tensor([0, 24]), torch.tensor([-1, 3]), torch.rand(4)])
def test_renumbering_by_no_codes(used, tmp_path):
    folder = save_original(Original(), tmp_path, TAMING_TARGET, "state_dict", **{"quantize.used": used})
    with pytest.raises(ValueError, match=r"quantize\.used (spans \[|is torch\.float32)"):
        VQGANModel.from_original(folder)


# ------------------------------------------------------------------------------------------------------------- configs


def aliases(levels: int = 12) -> str:
    """A list of nine of a list of nine of ...: 9^12 values in a few lines."""
    return "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, levels))


MERGES = "".join(f"m{n}: &m{n}\n" + "".join(f" {n}{k}: 1\n" for k in range(7000)) for n in "abc")
MERGES += "all: {<<: [*ma, *mb, *mc]}\n"
CONFIGS = {
    "aliases": (aliases(), "holds more than 20000 values with its aliases written out"),
    "aliases as a value": (aliases() + "n_embed: *a11\n", "holds more than 20000 values"),
    "in itself": ("a: &a [*a]\n", "nested deeper than 50 levels"),
    "merges": (MERGES, "one mapping has more than 20000 entries"),  # without bound in PyYAML before 6.0.4
    "deep": ("[" * 100_000, "nested deeper than 50 levels"),
    "deep mapping": ("".join(" " * n + "a:\n" for n in range(900)), "nested deeper than 50 levels"),
    "large": ("a: " + "x" * 2**20, "has 1048579 bytes, expected at most 524288"),
    "object": ("!!python/object/apply:os.system ['touch ran']", "is not YAML or JSON"),
    "number": ("n: " + "9" * 5000, "is not YAML or JSON"),
    "date": ("n: 2021-13-45", "is not YAML or JSON"),
    "bool": ("n: !!bool perhaps", "is not YAML or JSON"),
    "list": ("[1, 2]", "expected names and values, found a list"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_without_bounds(name, tmp_path):
    content, message = CONFIGS[name]
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ValueError, match=f"config .*{message}"):
        read_config(tmp_path / "config.yaml")


def test_configs_in_python_have_bounds_too(tmp_path):
    bomb: list = ["x"]
    for _ in range(40):
        bomb = [bomb, bomb]
    folder = save_original(Original(), tmp_path, {}, "state_dict")
    with pytest.raises(ValueError, match="config holds more than 20000 values"):
        VQGANModel.from_original(folder, config={"n_embed": bomb})
    with pytest.raises(ValueError, match="config is a list: expected a dict"):
        VQGANModel.from_original(folder, config=[1])


def test_aliases_as_people_use_them(tmp_path):
    text = "size: &size 24\nmodel:\n  target: taming.models.vqgan.VQModel\n  params: {n_embed: *size}\n"
    folder = save_original(Original(), tmp_path, {}, "state_dict")
    (folder / "config.yaml").write_text(text)
    assert VQGANModel.from_original(folder).config.num_vq_embeddings == 24


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"n_embed": "24"}, "n_embed='24' but 24"),
        ({"n_embed": float("nan")}, "n_embed=nan but 24"),
        ({"n_embed": 10**500}, "n_embed=1000.* but 24"),
        ({"beta": float("nan")}, r"beta=nan, expected a number in \[0, inf\]"),
        ({"beta": -1}, "beta=-1, expected"),
        ({"beta": True}, "beta=True, expected a number"),
        ({"beta": "x" * 10**6}, "beta='xxx.*, expected a number"),
        ({"ddconfig": [1]}, r"ddconfig=\[1\], expected names and values"),
        ({"ddconfig": {"resolution": 10**30}}, "resolution=10*, expected a whole number"),
        ({"ddconfig": {"resolution": [256, 256]}}, r"resolution=\[256, 256\], expected a whole number"),
        ({"ddconfig": {"ch_mult": [1, 2, 4]}}, r"ch_mult=\[1, 2, 4\] but \[1.0, 2.0, 2.0\]"),
        ({"ddconfig": {"ch_mult": 4}}, "ch_mult=4 but"),
        ({"ddconfig": {"in_channels": 1}}, "in_channels=1 but 3"),
        ({"codebook_l2_norm": True}, "codebook_l2_norm=True, which VQGANModel cannot represent"),
        ({"tanh_out": "false"}, "tanh_out='false', which VQGANModel cannot represent"),
    ],
)
def test_settings_that_are_no_such_thing(settings, message, tmp_path):
    folder = save_original(Original(), tmp_path, {}, "state_dict")
    config = {"model": {"target": "taming.models.vqgan.VQModel", "params": settings}}
    with pytest.raises(ValueError, match=message) as caught:
        VQGANModel.from_original(folder, config=config)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("key", ["target", "model_type"])
def test_class_that_is_no_name(key, tmp_path):
    folder = save_original(Original(), tmp_path, {}, "state_dict")
    with pytest.raises(ValueError, match=f"its config has {key}=5, expected the name of a class"):
        VQGANModel.from_original(folder, config={key: 5})


# ------------------------------------------------------------------------------------------------------- several files


@pytest.fixture
def sharded(tmp_path):
    """(index file, its content) of a checkpoint in two files, and a third outside its folder."""
    tensors = Original().state_dict()
    names = list(tensors)
    folder = tmp_path / "inside"
    folder.mkdir()
    places = {}
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / f"{number}.safetensors")
        places |= dict.fromkeys(part, f"{number}.safetensors")
    save_file({name: tensors[name] for name in names[1::2]}, tmp_path / "outside.safetensors")
    return folder / "model.safetensors.index.json", {"weight_map": places}


def load_index(index: Path, content: object) -> VQGANModel:
    index.write_text(json.dumps(content))
    return VQGANModel.from_original(index, config=TAMING_TARGET)


def test_shards_outside_the_folder(sharded, tmp_path):
    index, content = sharded
    load_index(index, content)
    for place in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "..", "", "/", "x/../1.safetensors"):
        moved = {name: place if shard.startswith("1") else shard for name, shard in content["weight_map"].items()}
        with pytest.raises(ValueError, match="names the shard .*: expected the name of a file beside it"):
            load_index(index, {"weight_map": moved})
    (index.parent / "1.safetensors").unlink()
    (index.parent / "1.safetensors").symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(ValueError, match=r"its shards 1\.safetensors are links out of the folder"):
        load_index(index, content)


def test_shards_in_the_cache_of_the_hub(sharded, tmp_path):
    """There, every file is a link to a folder of blobs beside it."""
    index, content = sharded
    index.write_text(json.dumps(content))
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    index.parent.rename(blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    VQGANModel.from_original(snapshot, config=TAMING_TARGET)


def test_indexes_that_are_none(sharded):
    index, content = sharded
    places = content["weight_map"]
    first = next(iter(places))
    for broken, message in (
        ([1], "it has no 'weight_map'"),
        ({"weight_map": [1]}, "must give the name of a file for each tensor"),
        ({"weight_map": places | {first: None}}, "must give the name of a file for each tensor"),
        ({"weight_map": places | {first: index.name}}, "names the shard .*expected the name of a file"),
        ({"weight_map": places | {"more": "0.safetensors"}}, "names tensors that its shards do not hold: more"),
    ):
        with pytest.raises(ValueError, match=message):
            load_index(index, broken)
    # A tensor that the index leaves out is there all the same.
    load_index(index, {"weight_map": {name: place for name, place in places.items() if name != first}})
    save_file(load_file(index.parent / "0.safetensors") | {"oops": torch.zeros(1)}, index.parent / "0.safetensors")
    with pytest.raises(ValueError, match="1 surplus: oops"):
        load_index(index, content)
    index.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="it has no 'weight_map'"):
        VQGANModel.from_original(index)


def test_no_file_and_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a file nor a folder"):
        VQGANModel.from_original("/dev/null")
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        VQGANModel.from_original(tmp_path / "model.safetensors")
