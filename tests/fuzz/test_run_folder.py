"""
A run's folder after anything may have happened to its files: it is resumed, in a state that was saved, or refused.

Each seed makes its own damage, from one whole run, and opens the folder as a training run does. Never may there be
another exception than the documented ones, a message that does not name the place, an endless wait, code that runs out
of a file, or a state other than one of those that were saved.
"""

import json
import os
import pickle
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent.parent))
from conftest import TINY, photo
from test_run_checkpoint import Bomb, parts_of
from test_training import run_config, stop_after

from hf_vqgan import VQGANConfig
from hf_vqgan.training.checkpoint import collect_states
from hf_vqgan.training.run_folder import RunFolder, find_damage, write_manifest
from hf_vqgan.training.tokenizer import train


@pytest.fixture(scope="session")
def whole(tmp_path_factory, random_trunk):
    """A run killed after its fifth step of eight, with checkpoints of steps 2 and 4; what it takes to go on; states."""
    folder = tmp_path_factory.mktemp("whole")
    for split in ("train", "validation"):
        (folder / "images" / split).mkdir(parents=True)
        for number in range(8):
            photo(number).save(folder / "images" / split / f"{number}.png")
    tiny = VQGANConfig(**TINY)
    more = dict(max_train_steps=8, use_ema=True, streaming=True, checkpoints_total_limit=None, lecam_weight=0.1)
    config = run_config(folder / "images", random_trunk, folder / "run", **more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_vqgan.training.loop.count_bad_images", stop_after(5))
        with pytest.raises(KeyboardInterrupt):
            train(config, tiny)
    parts, accelerator = parts_of(config, tiny)
    fresh = digest(parts, accelerator)
    states = {}
    with RunFolder(config, tiny, accelerator) as run:
        for checkpoint in run.checkpoints():
            run.load_checkpoint(checkpoint, parts)
            states[checkpoint.name] = digest(parts, accelerator)
    assert len({fresh, *states.values()}) == 3
    return config, parts, states


def digest(parts: dict, accelerator: Accelerator) -> str:
    states = collect_states(parts, accelerator)
    return json.dumps(states, default=lambda tensor: [str(tensor.dtype), tensor.tolist()], sort_keys=True)


# ------------------------------------------------------------------------------------------------ damage


def flip_bytes(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes() or b"\0")
    for _ in range(rng.choice((1, 1, 5))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def truncate(file: Path, rng: random.Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: rng.randrange(len(content) + 1)])


def replace_by_folder(file: Path, rng: random.Random) -> None:
    file.unlink()
    file.mkdir()
    if rng.random() < 0.5:
        (file / "more").write_text("x")


def replace_by_link(file: Path, rng: random.Random) -> None:
    others = [path for path in file.parent.iterdir() if path.is_file() and path != file] or [Path("/dev/null")]
    file.unlink()
    file.symlink_to(rng.choice([file, Path("/nowhere"), Path("/dev/zero"), file.parent, rng.choice(others)]))


def replace_by_pipe(file: Path, rng: random.Random) -> None:
    file.unlink()
    os.mkfifo(file)


def encode_differently(file: Path, rng: random.Random) -> None:
    text = file.read_bytes().decode("latin-1")
    file.write_bytes(text.encode(rng.choice(("utf-16", "utf-32", "utf-8-sig", "cp037")), "replace"))


def nest_deeply(file: Path, rng: random.Random) -> None:
    opening, closing = rng.choice((("[", "]"), ('{"a": ', "}"), ("- ", ""), ("{a: ", "}")))
    depth = rng.choice((50, 3000))
    file.write_text(opening * depth + "1" + closing * depth)


def put_in_place_of_a_number(file: Path, rng: random.Random) -> None:
    text = file.read_bytes().decode("latin-1")
    places = [place for place, character in enumerate(text) if character.isdigit()] or [0]
    place = rng.choice(places)
    new = rng.choice(("NaN", "-Infinity", "1e999", "9" * 400, "9" * 5000, '"x"', "null", "-1", "[1]", "{}", "true"))
    file.write_bytes((text[:place] + new + text[place + 1 :]).encode("latin-1"))


def replace_contents(file: Path, rng: random.Random) -> None:
    as_yaml = ("a: b\n", "? [a]\n: b", "&a [*a]", "a: !!int x", "a: !!timestamp x", "!!python/object/apply:os.abort []")
    as_state = ("[]", '{"model": {"$tensor": "x"}}', '{"model": {"$items": [1]}}', '{"../../x": {}}')
    contents = ["", "\n", "{}", "[]", "5", "null", '"x"', "[" * 100_000, "\0" * 100, *as_yaml]
    contents += [f'{{"format": 1, "states": {states}}}' for states in as_state]
    file.write_text(rng.choice(contents))


def replace_by_pickle(file: Path, rng: random.Random) -> None:
    file.write_bytes(pickle.dumps({"step": Bomb(exploded(file)), "state": 1}))


def exchange(file: Path, rng: random.Random) -> None:
    files = [path for path in file.parent.rglob("*") if path.is_file()]
    other = rng.choice(files)
    ours, theirs = file.read_bytes(), other.read_bytes()
    file.write_bytes(theirs)
    other.write_bytes(ours)


def change_tensor(file: Path, rng: random.Random) -> None:
    try:
        tensors = load_file(file)
    except SafetensorError:  # another file, or damaged already
        return flip_bytes(file, rng)
    name = rng.choice(sorted(tensors))
    change = rng.choice((
        lambda tensor: tensor.double(),
        lambda tensor: tensor.to(torch.uint8),
        lambda tensor: tensor.flatten()[:-1].clone(),
        lambda tensor: tensor[None],
    ))  # fmt: skip
    tensors[name] = change(tensors[name])
    if rng.random() < 0.2:
        del tensors[name]
    save_file(tensors, file)


def delete(file: Path, rng: random.Random) -> None:
    file.unlink()


def empty(file: Path, rng: random.Random) -> None:
    file.write_bytes(b"")


def repeat(file: Path, rng: random.Random) -> None:
    file.write_bytes(file.read_bytes() * 2)


def rename(file: Path, rng: random.Random) -> None:
    file.rename(file.with_name(rng.choice(("random_states_0.pkl", "model.bin", "state.json", "x"))))


DAMAGE: tuple[Callable[[Path, random.Random], object], ...] = (
    flip_bytes,
    truncate,
    replace_by_folder,
    replace_by_link,
    replace_by_pipe,
    encode_differently,
    nest_deeply,
    put_in_place_of_a_number,
    replace_contents,
    replace_by_pickle,
    exchange,
    change_tensor,
    delete,
    empty,
    repeat,
    rename,
)


def exploded(file: Path) -> Path:
    return next(parent for parent in file.parents if parent.name == "case") / "exploded"


def damage(folder: Path, rng: random.Random) -> tuple[str, bool]:
    """Damage some files, and say which; and whether a checkpoint's manifest was then made to agree."""
    told, agrees = [], False
    for _ in range(rng.choice((1, 1, 2, 3))):
        files = [path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".png", ".py")]
        if rng.random() < 0.5:  # small files of great consequence
            chosen = [path for path in files if path.suffix in (".json", ".yaml", ".jsonl")]
            files = chosen or files
        file, how = rng.choice(files), rng.choice(DAMAGE)
        told.append(f"{how.__name__}({file.relative_to(folder)})")
        how(file, rng)
        manifest = file.parent / "manifest.json"
        in_checkpoint = file.parent.name.startswith("checkpoint-") and file != manifest and not manifest.is_dir()
        if in_checkpoint and rng.random() < 0.4:
            manifest.unlink(missing_ok=True)
            write_manifest(file.parent)
            agrees = True
    return ", ".join(told), agrees


# ------------------------------------------------------------------------------------------------ the test


def open_as_training_does(run: RunFolder, parts: dict) -> str | None:
    checkpoint = run.open()
    if checkpoint is not None:
        run.load_checkpoint(checkpoint, parts)
    run.truncate_log(4)
    for row in run.read_log():
        assert row["step"] <= 4
    if run.has_metrics:
        run.read_metrics()
    return None if checkpoint is None else checkpoint.name


@pytest.mark.parametrize(
    "seeds", [range(100), pytest.param(range(100, 3100), marks=pytest.mark.slow)], ids=["100", "3000"]
)
def test_damaged_folder_is_resumed_or_refused(whole, tmp_path, monkeypatch, seeds):
    config, parts, states = whole
    tiny = VQGANConfig(**TINY)
    monkeypatch.setattr("hf_vqgan.training.run_folder.LOCK_PATIENCE", 0.2)
    outcomes = {"resumed": 0, "anew": 0, "refused": 0}
    for seed in seeds:
        rng = random.Random(seed)
        case = tmp_path / "case"
        shutil.copytree(config.output_dir, case / "run")
        told, agrees = damage(case / "run", rng)
        fields = {"output_dir": str(case / "run"), "overwrite_output_dir": rng.random() < 0.15}
        fields["resume_from_checkpoint"] = rng.choice((None, None, "latest", str(case / "run" / "checkpoint-4")))
        case_config = type(config)(**{**vars(config), **fields})
        signal.alarm(60)
        try:
            with RunFolder(case_config, tiny, Accelerator()) as run:
                resumed = open_as_training_does(run, parts)
        except (ValueError, OSError) as error:
            assert str(case) in str(error) and str(error).count("\n") == 0, f"seed {seed}: {told}: {error!r}"
            outcomes["refused"] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}: {told}: {error!r}") from error
        else:
            outcomes["anew" if resumed is None else "resumed"] += 1
            if resumed is not None and not agrees:
                assert digest(parts, Accelerator()) == states[resumed], f"seed {seed}: {told}"
            settings = yaml.safe_load((case / "run" / "training_config.yaml").read_text())
            assert settings["dataset_name"] == config.dataset_name
        finally:
            signal.alarm(0)
        assert not (case / "exploded").exists(), f"seed {seed}: {told}: code of a file was run"
        shutil.rmtree(case)
    print(outcomes)
    assert min(outcomes["resumed"], outcomes["refused"]) > len(seeds) / 10, outcomes


def test_whole_folder_is_whole(whole):
    """Or nothing above would be seen."""
    config, _, states = whole
    for name in states:
        assert find_damage(Path(config.output_dir) / name) is None
