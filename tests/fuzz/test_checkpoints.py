"""
Published checkpoints of every family, damaged at random: each loads as its file has it, or one clear error refuses it.

A case is its seed. `python tests/fuzz/test_checkpoints.py 1000 2000` runs the cases from 1000 up to 2000 and prints how
they ended; with one number it runs that case and shows its traceback.
"""

import collections
import copy
import json
import math
import random
import re
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from diffusers import VQModel
from limits import TooLong, limits
from test_conversion import GOLDENS, STAND_INS

from hf_vqgan import VQGANModel
from hf_vqgan.files.checkpoint_files import read_checkpoint

WITH_GOLDENS = 1_000_000  # seeds from here on choose among the golden checkpoints, too


@dataclass
class Base:
    """A checkpoint before the damage."""

    name: str
    tensors: dict[str, torch.Tensor]
    config: dict


@cache
def bases() -> list[Base]:
    made = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, (kind, options, config, _) in STAND_INS.items():
            made.append(Base(name, kind(**{"mult": (1, 2)} | options).state_dict(), config))
        made.append(Base("prefixed", {f"first_stage_model.{key}": value for key, value in made[0].tensors.items()}, {}))
        averages = {"model_ema." + key.replace(".", ""): value + 1 for key, value in made[0].tensors.items()}
        averages |= {"model_ema.num_updates": torch.tensor(-1, dtype=torch.int32), "loss.logvar": torch.zeros(1)}
        made.append(Base("ibq-averages", made[0].tensors | averages, {}))
        made.append(Base("renumbered", made[0].tensors | {"quantize.used": torch.arange(5)}, {}))
        diffusers = VQModel(block_out_channels=(32, 64), num_vq_embeddings=24, latent_channels=4)
        made.append(Base("diffusers", diffusers.state_dict(), {"_class_name": "VQModel", "norm_num_groups": 16}))
    return made


@cache
def goldens() -> list[Base]:
    made = []
    for meta_file in sorted(GOLDENS.glob("*/meta.json")):
        meta = json.loads(meta_file.read_text())
        checkpoint = read_checkpoint(meta_file.parent / meta["checkpoint"], ("state_dict", "model", "vae"))
        tensors = {name: checkpoint.load(name).clone() for name in checkpoint.shapes}
        config = yaml.safe_load((meta_file.parent / meta["config"]).read_text()) if "config" in meta else {}
        made.append(Base(meta["family"], tensors, config))
    return made


# ------------------------------------------------------------------------------------------------- damage to tensors

NUMBERS = ("999999999", "-1", "-999", "9" * 30, "7", "2", "0", "00", "01", "1e3", "²", "٣", "", "17", "1.0")
WORDS = ("weight", "", "ключ", "a\nencoder.down.0.block.0.conv1.weight", "\x1b[31m", "x" * 100_000, "__class__", "..")


def renumbered(choose: random.Random, name: str) -> str:
    numbers = list(re.finditer(r"(?<=\.)\d+(?=\.)", name)) or [re.search(r"$", name)]
    place = choose.choice(numbers)
    return name[: place.start()] + choose.choice(NUMBERS) + name[place.end() :]


def reworded(choose: random.Random, name: str) -> str:
    parts = name.split(".")
    parts[choose.randrange(len(parts))] = choose.choice(WORDS)
    return ".".join(parts)


def rename(choose, tensors):
    name = choose.choice(list(tensors))
    tensors[choose.choice((renumbered, reworded))(choose, name)] = tensors.pop(name)


def duplicate(choose, tensors):
    name = choose.choice(list(tensors))
    tensors[choose.choice((renumbered, reworded))(choose, name)] = tensors[name].clone()


def remove(choose, tensors):
    del tensors[choose.choice(list(tensors))]


def remove_group(choose, tensors):
    start = ".".join(choose.choice(list(tensors)).split(".")[: choose.randint(1, 4)])
    for name in [name for name in tensors if name.startswith(start)]:
        del tensors[name]


def prefix_all(choose, tensors):
    prefix = choose.choice(("module.", "encoder.", "x", "a.b.c.", "loss.", ".", "first_stage_model.", "quantize."))
    for name in list(tensors):
        tensors[prefix + name] = tensors.pop(name)


def reshape(choose, tensors):
    name = choose.choice(list(tensors))
    tensor = tensors[name]
    shape = list(tensor.shape)
    kind = choose.choice(("side", "rank", "flat", "empty", "scalar", "turned", "double"))
    if kind == "side" and shape:
        shape[choose.randrange(len(shape))] = choose.choice((1, 2, 31, 33, 64, 1000))
        tensor = torch.randn(shape) if math.prod(shape) < 10**7 else torch.zeros(0)
    elif kind == "rank":
        tensor = tensor[None] if choose.random() < 0.5 else tensor[..., None, None]
    elif kind == "flat":
        tensor = tensor.flatten()
    elif kind == "empty":
        tensor = torch.zeros([choose.choice((0, 10**9)), 0] + shape[2:])
    elif kind == "scalar":
        tensor = tensor.flatten()[:1].squeeze() if tensor.numel() else tensor
    elif kind == "turned":
        tensor = tensor.movedim(0, -1).contiguous() if tensor.ndim else tensor
    else:
        tensor = torch.cat([tensor, tensor]) if tensor.ndim else tensor
    tensors[name] = tensor.clone()


DTYPES = (
    torch.int64, torch.int8, torch.uint8, torch.bool, torch.float16, torch.bfloat16, torch.float64, torch.complex64,
    torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip


def retype(choose, tensors):
    dtype = choose.choice(DTYPES)
    names = list(tensors) if choose.random() < 0.3 else [choose.choice(list(tensors))]
    tensors |= {name: tensors[name].to(dtype) for name in names}


def spoil(choose, tensors):
    name = choose.choice(list(tensors))
    if tensors[name].is_floating_point() and tensors[name].numel():
        tensors[name] = tensors[name].clone()
        tensors[name].flatten()[choose.randrange(tensors[name].numel())] = choose.choice(
            (math.nan, math.inf, -math.inf)
        )


def add(choose, tensors):
    number = choose.randint(-3, 40)
    tensors |= choose.choice(
        (
            {"quantize.used": torch.tensor([number, 0, 1])},
            {"quantize.used": torch.rand(3)},
            {"quantize.embedding.cluster_size": torch.rand(24)},
            {"quantize.embedding.embed_avg": torch.rand(24, 4)},
            {"model_ema.num_updates": torch.tensor([1.5, 2])},
            {"model_ema.num_updates": torch.tensor(-1)},
            {"model_ema.encoderconv_inweight": torch.rand(2)},
            {"loss.perceptual_loss.net.weight": torch.rand(2)},
            {"post_quant_conv.weight": torch.rand(3, 3)},
            {"encoder.conv_in.weight": torch.rand(32, 3, 3, 3)},
            {"other.encoder.conv_in.weight": torch.rand(32, 3, 3, 3)},
            {"decoder.norm_out.conv_y.weight": torch.rand(32, 4, 1, 1)},
            {"quantize.proj.weight": torch.rand(24, 4, 1, 1)},
            {f"encoder.down.{number}.block.0.conv1.weight": torch.rand(32, 32, 3, 3)},
            {f"encoder.down.0.block.{number}.conv1.weight": torch.rand(32, 32, 3, 3)},
        )
    )


TENSOR_DAMAGE = (rename, rename, duplicate, remove, remove_group, prefix_all, reshape, reshape, retype, spoil, add)

# -------------------------------------------------------------------------------------------- damage to configurations

NONSENSE = (
    None, "", "128", "none", -1, 0, 1, 3, 32, 1.5, math.nan, math.inf, -0.5, 10**30, 10**400, True, False, [], {},
    [1, 2], ["a"], {"a": {"b": 1}}, "x" * 50_000, "taming.models.vqgan.VQModel", "IBQ", "VQModel", "MOVQ", "²", "1e400",
    [[[[]]]], {"ddconfig": {}}, "null",
)  # fmt: skip
SETTING_NAMES = (
    "n_embed", "embed_dim", "z_channels", "resolution", "beta", "tanh_out", "give_pre_end", "codebook_l2_norm",
    "act_fn",
    "norm_num_groups", "remap", "target", "class_path", "_class_name", "model_type", "model", "params", "init_args",
    "ddconfig", "lossconfig", "ch", "ch_mult", "num_res_blocks", "attn_type", "double_z", "decay", "kl_weight",
    "scaling_factor", "shift_factor", "force_upcast", "lookup_from_codebook", "use_ema", "in_channels", "out_ch",
    "cosine_similarity", "commitment_cost", "vq_config", "image_size", "attn_resolutions", "use_entropy_loss",
)  # fmt: skip
BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
MERGES = "m0: &m0 {a: 1, b: 2}\n" + "".join(
    f"m{n}: &m{n}\n  <<: [{', '.join([f'*m{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
CONFIG_TEXTS = (
    BOMB + "n_embed: *a11\n", BOMB + "ddconfig: *a11\n", MERGES, "a: &a [*a]\nn_embed: *a\n", "[" * 5000, "{" * 5000,
    "- 1\n- 2\n", "just text", "", "\0", "a: b: c", "!!python/object/apply:os.system ['exit 1']", "x: !!int ''",
    "x: !!bool perhaps", "x: !!timestamp never", "n_embed: 2021-13-45", "n_embed: " + "9" * 5000, "? [a]\n: 1\n",
    "x: &x 1\ny: *x\n", "*nowhere", "a: !!binary '===='", "\ufeffa: 1", "é: 1", "beta: !!float x", "<<: 1",
)  # fmt: skip


def parts_of(config: dict) -> list[dict]:
    inner = [part for value in config.values() if isinstance(value, dict) for part in parts_of(value)]
    return [config, *inner]


def damage_config(choose: random.Random, config: dict) -> dict | str:
    kind = choose.choice(("text", "replace", "replace", "remove", "add", "add", "add"))
    if kind == "text":
        return choose.choice(CONFIG_TEXTS)
    config = copy.deepcopy(config)
    part = choose.choice(parts_of(config))
    if kind == "add" or not part:
        part[choose.choice(SETTING_NAMES)] = choose.choice(NONSENSE)
    elif kind == "replace":
        part[choose.choice(list(part))] = choose.choice(NONSENSE)
    else:
        del part[choose.choice(list(part))]
    return config


# ------------------------------------------------------------------------------------------------------- writing files


def wrapped(choose: random.Random, tensors: dict) -> object:
    """The state dict as a training file holds it, or as none should."""
    circle: dict = {"state_dict": {}}
    circle["state_dict"] = circle
    damaged = dict(tensors)
    if damaged:
        damaged[choose.choice(list(damaged))] = choose.choice(
            (None, [1.0], "text", {"a": 1}, 3, torch.eye(3).to_sparse())
        )
    return choose.choice(
        (
            tensors, {"state_dict": tensors}, {"model": tensors, "steps": 3}, {"state_dict": {"state_dict": tensors}},
            {"model": {"state_dict": collections.OrderedDict(tensors)}}, {"ema": {}, "model": tensors},
            list(tensors.values()),
            {"state_dict": list(tensors.items())}, {"state_dict": None}, None, {}, {"state_dict": {}}, damaged, circle,
            {"state_dict": tensors, "model": None}, {1: tensors}, {"state_dict": {1: torch.zeros(1)}}, (tensors,),
            {"weights": tensors}, torch.zeros(3), "text", {"state_dict": damaged},
        )
    )  # fmt: skip


def write_shards(choose: random.Random, tensors: dict, folder: Path) -> Path:
    names = list(tensors)
    places = {}
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name].contiguous() for name in part}, folder / f"part{number}.safetensors")
        places |= dict.fromkeys(part, f"part{number}.safetensors")
    kind = choose.choice(
        ("whole", "outside", "absolute", "link", "lacking", "unnamed", "list", "text", "itself", "null", "gone")
    )
    elsewhere = folder.parent / "outside.safetensors"
    if kind in ("outside", "absolute", "link"):
        (folder / "part1.safetensors").rename(elsewhere)
        if kind == "link":
            (folder / "part1.safetensors").symlink_to(elsewhere)
        moved = {"outside": "../outside.safetensors", "absolute": str(elsewhere), "link": "part1.safetensors"}[kind]
        places = {name: place.replace("part1.safetensors", moved) for name, place in places.items()}
    elif kind == "lacking":
        places["encoder.lacking"] = "part0.safetensors"
    elif kind == "unnamed" and places:
        del places[choose.choice(list(places))]
    elif kind == "itself":
        places["encoder.more"] = "model.safetensors.index.json"
    elif kind == "null" and places:
        places[choose.choice(list(places))] = choose.choice(
            (None, 3, "", ".", "..", "/", "x/../part0.safetensors", "\0")
        )
    elif kind == "gone":
        (folder / "part0.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    content = {"list": [1], "text": "text"}.get(kind, {"weight_map": places})
    index.write_text("[" * 100_000 if kind == "text" and choose.random() < 0.5 else json.dumps(content))
    return index


def damage_file(choose: random.Random, file: Path) -> Path:
    data = bytearray(file.read_bytes())
    kind = choose.choice(
        ("cut", "flip", "flip", "flip_start", "suffix", "empty", "folder", "append", "zeros", "folder_in")
    )
    if kind == "cut":
        del data[choose.randrange(len(data) + 1) :]
    elif kind in ("flip", "flip_start"):
        reach = len(data) if kind == "flip" else min(len(data), 3000)
        for _ in range(choose.choice((1, 3, 30))):
            data[choose.randrange(reach)] ^= 1 << choose.randrange(8)
    elif kind == "empty":
        data.clear()
    elif kind == "append":
        data += bytes(choose.randrange(256) for _ in range(100))
    elif kind == "zeros":
        start = choose.randrange(len(data))
        data[start : start + 1000] = bytes(len(data[start : start + 1000]))
    file.write_bytes(data)
    if kind == "suffix":
        return file.rename(
            file.with_suffix(choose.choice((".safetensors", ".ckpt", ".bin", ".pth", ".index.json", ".txt")))
        )
    if kind.startswith("folder"):
        file.unlink()
        file.mkdir()
        return file if kind == "folder" else file.parent
    return file


@dataclass
class Case:
    path: Path
    options: dict
    tensors: dict | None  # what the file holds, where that is known
    story: str


def make_case(seed: int, folder: Path) -> Case:
    choose = random.Random(seed)
    torch.manual_seed(seed)
    base = choose.choice(bases() + (goldens() if seed >= WITH_GOLDENS else []))
    tensors, config, story = dict(base.tensors), copy.deepcopy(base.config), [base.name]
    targets = [choose.choice(("tensors", "tensors", "tensors", "config", "wrapper", "file", "shards", "nothing"))]
    targets += [choose.choice(("tensors", "config", "options"))] if choose.random() < 0.3 else []
    if "tensors" in targets:
        for damage in choose.choices(TENSOR_DAMAGE, k=choose.choice((1, 1, 1, 2, 3))):
            if tensors:
                damage(choose, tensors)
                story.append(damage.__name__)

    # The weights
    content: object = tensors
    if "shards" in targets:
        path = write_shards(choose, tensors, folder)
    elif choose.random() < 0.4 and "wrapper" not in targets:
        path = folder / "model.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    else:
        path = folder / choose.choice(("model.ckpt", "pytorch_model.bin", "vq.pt"))
        wrapper = choose.choice(("state_dict", "model", None))
        content = tensors if wrapper is None else {wrapper: tensors, "epoch": 3}
        content = wrapped(choose, tensors) if "wrapper" in targets else content
        torch.save(content, path, _use_new_zipfile_serialization=choose.random() < 0.7)
    if "file" in targets:
        path = damage_file(choose, path)

    # The config
    config = damage_config(choose, config) if "config" in targets else config
    options = {}
    if isinstance(config, dict) and "config" in targets and choose.random() < 0.2:
        options["config"] = config
    elif config != {} or choose.random() < 0.1:
        text = config if isinstance(config, str) else yaml.safe_dump(config, allow_unicode=True)
        ending = choose.choice(("yaml", "json"))
        if ending == "json" and not isinstance(config, str):
            text = json.dumps(config)
        (folder / f"config.{ending}").write_text(text, encoding="utf-8")
    if "options" in targets:
        options["format"] = choose.choice(
            list(STAND_INS) + ["auto", "ldm", "diffusers", "diffusers_old", "seed_voken", "x"]
        )
        options["weights"] = choose.choice(("raw", "ema", "auto", "x"))
    known = not {"file", "wrapper", "shards"} & set(targets)
    return Case(path, options, tensors if known else None, " ".join([*story, *targets, path.name, str(options)[:200]]))


# ------------------------------------------------------------------------------------------------------------ the check

# What the documentation says is left out: see docs/checkpoints.md
EXTRAS = re.compile(
    r"loss\.|model_ema\.|colorize$|quantize\.codebook_used$|ema_(encoder|decoder|quantize|quant_conv|post_quant_conv)\."
)


def signature(tensor: torch.Tensor) -> tuple:
    numbers = tensor.flatten().to(torch.float64)
    return len(numbers), round(float(numbers.sum()), 6), round(float((numbers * torch.arange(len(numbers))).sum()), 3)


def check_loaded(model: VQGANModel, tensors: dict | None) -> None:
    """A forward pass works, and every tensor of the file is in the model."""
    side = model.config.downsample_factor * 2
    pixels = torch.rand(1, model.config.in_channels, side, side).to(model.dtype)
    with torch.no_grad():
        if model.config.encoder_only:
            model.encode_indices(pixels)
        else:
            assert model(pixels).sample.shape == (1, model.config.out_channels, side, side)
    if tensors is None:
        return
    held = collections.Counter(signature(tensor) for tensor in model.state_dict().values())
    anchors = ("encoder.conv_in.weight", "encoder.conv_in.bias")
    prefix = min((name.removesuffix(a) for name in tensors for a in anchors if name.endswith(a)), key=len)
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    averages = any(name.startswith("model_ema.") for name in own)
    for name, tensor in own.items():
        never_run = re.match(r"encoder\.down\.\d+\.attn\.", name) and model.config.pixel_range == (0, 1)
        unused = model.config.encoder_only and name.startswith("post_quant_conv.")
        if not (EXTRAS.match(name) or never_run or unused or averages):
            assert held[signature(tensor)] > 0, f"{name} was silently ignored"
            held[signature(tensor)] -= 1


def run_case(seed: int, folder: Path, shows: bool = False) -> tuple[str, str]:
    """How the case ended: "loaded" or "refused", or a failure: "raw", "unclear", "hang", "memory", "wrong"."""
    case = make_case(seed, folder)
    story = f"seed {seed}: {case.story}"
    try:
        with limits():
            model = VQGANModel.from_original(case.path, **case.options)
    except (ValueError, FileNotFoundError) as error:
        text = str(error)
        if type(error) not in (ValueError, FileNotFoundError):
            return "raw", f"{story}: {type(error).__name__}: {text[:300]}"
        named = str(folder) in text or "config" in text or re.match(r"(format|weights)=", text)
        clear = named and text.isprintable() and len(text) < 30_000
        return ("refused", text) if clear else ("unclear", f"{story}: {text[:300]!r}")
    except TooLong as error:
        return "hang", f"{story}: {error}"
    except MemoryError as error:
        return "memory", f"{story}: {error}"
    except Exception as error:
        if shows:
            traceback.print_exc()
        return "raw", f"{story}: {type(error).__name__}: {str(error)[:300]}"
    try:
        with limits():
            check_loaded(model, case.tensors)
    except Exception as error:
        if shows:
            traceback.print_exc()
        return "wrong", f"{story}: {type(error).__name__}: {str(error)[:300]}"
    return "loaded", story


def run_cases(seeds: range, tell: Callable[[str], None]) -> collections.Counter:
    ends: collections.Counter = collections.Counter()
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "case").mkdir()
            end, story = run_case(seed, Path(folder) / "case")
        ends[end] += 1
        if end not in ("loaded", "refused"):
            tell(f"{end}: {story}")
    return ends


@pytest.mark.parametrize("start", range(0, 150, 25))
def test_damaged_checkpoints(start):
    failures: list[str] = []
    ends = run_cases(range(start, start + 25), failures.append)
    assert not failures, "\n".join(failures)
    assert ends["loaded"] and ends["refused"]


@pytest.mark.slow
@pytest.mark.parametrize("start", range(WITH_GOLDENS, WITH_GOLDENS + 5000, 250))
def test_many_damaged_checkpoints(start):
    failures: list[str] = []
    run_cases(range(start, start + 250), failures.append)
    assert not failures, "\n".join(failures)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        with tempfile.TemporaryDirectory() as where:
            (Path(where) / "case").mkdir()
            print(*run_case(int(sys.argv[1]), Path(where) / "case", shows=True))
    else:
        print(dict(run_cases(range(int(sys.argv[1]), int(sys.argv[2])), print)))
