"""What may happen to a run's folder between two commands, and what a checkpoint is made of."""

import dataclasses
import errno
import json
import os
import pickle
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import SPECIAL, TINY
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from test_training import assert_same_weights, run_config, stop_after

import hf_vqgan.training.run_folder
from hf_vqgan import QUANTIZERS, VQGANConfig
from hf_vqgan.files.options import role_of
from hf_vqgan.generation.denoisers import LatentDiffusionConfig
from hf_vqgan.generation.encoded_dataset import EncodingConfig
from hf_vqgan.training.checkpoint import (
    NamedAverages,
    NamedOptimizer,
    collect_states,
    read_states,
    restore_states,
    write_states,
)
from hf_vqgan.training.configuration import VQGANTrainingConfig
from hf_vqgan.training.networks import build_state, load_images
from hf_vqgan.training.run_folder import RunFolder, _is_written
from hf_vqgan.training.setup import build_accelerator
from hf_vqgan.training.tokenizer import checkpoint_parts, train

ROOT = Path(__file__).parent.parent


@pytest.fixture
def tiny():
    return VQGANConfig(**TINY)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr("hf_vqgan.training.run_folder.LOCK_PATIENCE", 0.2)


def open_folder(config: VQGANTrainingConfig, model: VQGANConfig | None = None) -> Path | None:
    with RunFolder(config, model or VQGANConfig(**TINY), Accelerator()) as run:
        return run.open()


def made_run(folder: Path, *checkpoints: int, **fields) -> VQGANTrainingConfig:
    """A folder as a run of these settings leaves it, with checkpoints that hold next to nothing."""
    config = VQGANTrainingConfig(
        **{"dataset_name": "user/images", "max_train_steps": 9, "output_dir": str(folder)} | fields
    )
    assert open_folder(config) is None
    for step in checkpoints:
        (folder / f"checkpoint-{step}").mkdir()
        write_states(folder / f"checkpoint-{step}", {"progress": {"step": step}})
        hf_vqgan.training.run_folder.write_manifest(folder / f"checkpoint-{step}")
    return config


# ------------------------------------------------------------------------------------------------ claiming a folder


def test_latest_starts_a_run_where_there_is_none(image_folder, random_trunk, tmp_path, tiny, capsys):
    """As in diffusers' scripts: a cluster's job passes it always, the first time as well."""
    config = run_config(
        image_folder, random_trunk, tmp_path / "run", max_train_steps=2, resume_from_checkpoint="latest"
    )
    train(config, tiny)
    assert "no checkpoint in" in capsys.readouterr().out
    train(dataclasses.replace(config, output_dir=str(tmp_path / "plain"), resume_from_checkpoint=None), tiny)
    assert_same_weights(tmp_path / "run", tmp_path / "plain")
    train(config, tiny)
    assert "already complete (2 steps)" in capsys.readouterr().out


def test_latest_is_an_error_where_all_checkpoints_are_damaged(tmp_path):
    config = made_run(tmp_path / "run", 3, 5)
    for step in (3, 5):
        (tmp_path / "run" / f"checkpoint-{step}" / "state.json").write_text("{}")
    for asked in (None, "latest"):
        with pytest.raises(
            ValueError, match=r"every checkpoint in .*run is damaged, checkpoint-5 because state.json has"
        ):
            open_folder(dataclasses.replace(config, resume_from_checkpoint=asked))


@pytest.mark.parametrize("names", [["holiday.jpg", "a/b.txt"], ["config.json", "model.safetensors", "README.md"]])
def test_overwriting_refuses_what_is_no_run(tmp_path, names):
    """Neither somebody's photographs nor a model that was downloaded."""
    for name in names:
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_text("mine")
    before = sorted((tmp_path / "photos").rglob("*"))
    config = VQGANTrainingConfig("user/images", output_dir=str(tmp_path / "photos"), overwrite_output_dir=True)
    with pytest.raises(FileExistsError, match=f"photos is not a run's folder: it holds .*{names[0]}"):
        open_folder(config)
    assert sorted((tmp_path / "photos").rglob("*")) == before


@pytest.mark.parametrize("source", ["", "vqvae", "checkpoint-3/../vqvae"])
def test_overwriting_spares_the_model_to_start_from(tmp_path, source):
    """`--vqgan runs/mine --output_dir runs/mine --overwrite_output_dir` deleted the tokenizer, which was in memory."""
    made_run(tmp_path / "run", 3)
    (tmp_path / "run" / "vqvae").mkdir()
    before = sorted((tmp_path / "run").rglob("*"))
    config = LatentDiffusionConfig(
        vqgan=str(tmp_path / "run" / source), dataset_name="d", output_dir=str(tmp_path / "run"),
        overwrite_output_dir=True,
    )  # fmt: skip
    with RunFolder(config, None, Accelerator()) as run:
        for claim in (run.open, run.check):
            with pytest.raises(FileExistsError, match=r"would delete --vqgan .*run.*, which this run needs"):
                claim()
    assert sorted((tmp_path / "run").rglob("*")) == before
    elsewhere = dataclasses.replace(config, vqgan=str(tmp_path / "run" / "my-models"))  # is not deleted
    with RunFolder(elsewhere, None, Accelerator()) as run:
        assert run.open() is None
    assert not (tmp_path / "run" / "vqvae").exists()


def test_checking_a_folder_finds_what_opening_it_would(tmp_path):
    """Dry runs said OK of a folder with another run."""
    config = made_run(tmp_path / "run", 3)
    other = dataclasses.replace(config, learning_rate=1.0)
    file = str(tmp_path / "run" / "training_config.yaml")
    cases = (
        (other, FileExistsError, "differs in: learning_rate. Choose"),
        (dataclasses.replace(config, resume_from_checkpoint="nowhere"), FileNotFoundError, "no such folder"),
        (dataclasses.replace(config, output_dir=file), FileExistsError, "is a file"),
    )  # fmt: skip
    before = sorted((tmp_path / "run").rglob("*"))
    for changed, error, message in cases:
        with RunFolder(changed, VQGANConfig(**TINY), Accelerator()) as run, pytest.raises(error, match=message):
            run.check()
    for fine in (config, dataclasses.replace(other, overwrite_output_dir=True),
                 dataclasses.replace(other, resume_from_checkpoint="latest"),
                 dataclasses.replace(config, output_dir=str(tmp_path / "new"))):  # fmt: skip
        with RunFolder(fine, VQGANConfig(**TINY), Accelerator()) as run:
            run.check()
    assert sorted((tmp_path / "run").rglob("*")) == before and not (tmp_path / "new").exists()
    (tmp_path / "run" / "checkpoint-3" / "state.json").write_text("{}")
    with RunFolder(config, VQGANConfig(**TINY), Accelerator()) as run, pytest.raises(ValueError, match="is damaged"):
        run.check()


@pytest.mark.parametrize("below", ["", "a/b"])
def test_a_file_in_the_way_is_named(tmp_path, below):
    """A bare `[Errno 20] Not a directory` does not say which of the names it is."""
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(FileExistsError, match=r"--output_dir .*notes.* is a file\. Choose another name"):
        open_folder(VQGANTrainingConfig("user/images", output_dir=str(tmp_path / "notes" / below)))
    assert (tmp_path / "notes").read_text() == "mine"


def test_overwriting_deletes_runs_with_other_settings_only(tmp_path, capsys):
    folder = tmp_path / "run"
    config = made_run(folder, 3, 5)
    (folder / "notes.txt").write_text("mine")
    again = dataclasses.replace(config, overwrite_output_dir=True)
    assert open_folder(again) == folder / "checkpoint-5"  # the very run, say of a job that was preempted
    other = dataclasses.replace(again, learning_rate=1.0)
    assert open_folder(dataclasses.replace(other, resume_from_checkpoint="latest")) == folder / "checkpoint-5"
    assert "in spite of other settings: learning_rate" in capsys.readouterr().out
    assert open_folder(again) == folder / "checkpoint-5"  # nothing was loaded, so nothing has changed
    assert open_folder(other) is None
    assert {path.name for path in folder.iterdir()} == {"notes.txt", "training_config.yaml", ".lock"}


def test_preempted_run_that_overwrites_goes_on(image_folder, random_trunk, tmp_path, tiny):
    config = run_config(image_folder, random_trunk, tmp_path / "whole")
    train(config, tiny)
    made_run(tmp_path / "stopped", 7)
    stopped = dataclasses.replace(config, output_dir=str(tmp_path / "stopped"), overwrite_output_dir=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_vqgan.training.loop.count_bad_images", stop_after(5))
        with pytest.raises(KeyboardInterrupt):
            train(stopped, tiny)
    assert (tmp_path / "stopped" / "checkpoint-4").is_dir() and not (tmp_path / "stopped" / "checkpoint-7").exists()
    (tmp_path / "stopped" / "checkpoint-4" / "witness").mkdir()
    train(stopped, tiny)
    assert (tmp_path / "stopped" / "checkpoint-4" / "witness").exists()  # it was not trained again
    assert_same_weights(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize("fails", ["rename", "rmtree"])
def test_interrupted_deletion_is_finished_by_the_next_command(tmp_path, monkeypatch, fails):
    """Whichever that is: half a run, without its later checkpoints, must not go on."""
    folder = tmp_path / "run"
    config = made_run(folder, 3, 5)
    with monkeypatch.context() as patch:
        calls = []

        def stop(*args, **kwargs):
            calls.append(args)
            if len(calls) == (2 if fails == "rename" else 1):
                raise KeyboardInterrupt
            return os.rename(*args)

        patch.setattr(*((Path, "rename") if fails == "rename" else (shutil, "rmtree")), stop)
        with pytest.raises(KeyboardInterrupt):
            open_folder(dataclasses.replace(config, learning_rate=1.0, overwrite_output_dir=True))
    (folder / "added-later.jpg").write_text("mine")
    assert open_folder(config) is None
    assert {path.name for path in folder.iterdir()} == {"training_config.yaml", ".lock", "added-later.jpg"}


def test_everything_a_run_writes_can_be_overwritten(image_folder, random_trunk, tmp_path, tiny):
    """What `WRITTEN` forgot would stay in the folder, say the curves of a tracker beside those of the next run."""
    pytest.importorskip("tensorboard")
    config = run_config(image_folder, random_trunk, tmp_path / "run", gradient_report_steps=2, report_to="tensorboard",
                        max_train_steps=2, use_ema=True)  # fmt: skip
    train(config, tiny)
    assert [path.name for path in (tmp_path / "run").iterdir() if not _is_written(path.name)] == []


HOLD = """
import sys, time
from hf_vqgan.training.run_folder import RunFolder
sys.path.insert(0, {tests!r})
from test_run_checkpoint import VQGANConfig, VQGANTrainingConfig, TINY, Accelerator
with RunFolder(VQGANTrainingConfig(**{fields!r}), VQGANConfig(**TINY), Accelerator()) as run:
    run.open()
    print("open", flush=True)
    time.sleep(600)
"""


def test_two_runs_in_one_folder_are_noticed(tmp_path):
    """And the folder is free again at once when the first is killed, however it is."""
    fields = dict(dataset_name="user/images", max_train_steps=9, output_dir=str(tmp_path / "run"), cpu_threads=1)
    code = HOLD.format(tests=str(ROOT / "tests"), fields=fields)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment, text=True)
    try:
        assert process.stdout.readline() == "open\n"
        holder = f"process {process.pid} on {socket.gethostname()}"
        for more in ({}, {"overwrite_output_dir": True, "learning_rate": 1.0}):
            with pytest.raises(FileExistsError, match=f"run is in use by a run that has not ended: {holder}"):
                open_folder(VQGANTrainingConfig(**fields | more))
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert open_folder(VQGANTrainingConfig(**fields)) is None
    assert open_folder(VQGANTrainingConfig(**fields)) is None  # our own lock has gone, too


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_file_systems_without_locks_get_a_warning(tmp_path, monkeypatch, caplog, number):
    """Some clusters' have none. That must not keep anybody from training there."""

    def no_locks(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", no_locks)
    assert open_folder(VQGANTrainingConfig("user/images", max_train_steps=9, output_dir=str(tmp_path / "run"))) is None
    assert "run has no locks" in caplog.text
    assert (tmp_path / "run" / "training_config.yaml").is_file()


@pytest.mark.parametrize("umask, expected", [(0o022, 0o644), (0o007, 0o660)])
def test_files_have_the_permissions_of_ordinary_files(image_folder, random_trunk, tmp_path, tiny, umask, expected):
    before = os.umask(umask)
    try:
        train(run_config(image_folder, random_trunk, tmp_path / "run", max_train_steps=1, quantize_start=0), tiny)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert modes == {expected}


# ------------------------------------------------------------------------------------------------ the same run?


def test_watching_a_run_in_another_way_does_not_change_it(image_folder, random_trunk, tmp_path):
    """Not a bit of what it learns, with a quantizer that draws random numbers."""
    model = VQGANConfig(**TINY | {"quantizer": "gumbel"})
    plain = run_config(image_folder, random_trunk, tmp_path / "plain", quantize_start=0)
    watched = dict(
        logging_steps=2,
        validation_steps=1,
        gradient_report_steps=1,
        checkpointing_steps=1,
        validation_pictures=1,
        max_nonfinite_steps=3,
        stop_on_collapse=True,
        checkpoints_total_limit=None,
        gradient_checkpointing=True,
        max_unreadable_share=0.9,
    )
    assert watched.keys() == {f.name for f in dataclasses.fields(plain) if role_of(f) == "watching"}
    train(dataclasses.replace(plain, gradient_report_steps=0), model)
    train(dataclasses.replace(plain, **watched, output_dir=str(tmp_path / "watched")), model)
    assert_same_weights(tmp_path / "plain", tmp_path / "watched")


def test_settings_that_the_checkpoint_does_not_fit_are_not_the_runs(image_folder, random_trunk, tmp_path, tiny):
    """After the refusal, the run's own command goes on as before."""
    config = run_config(image_folder, random_trunk, tmp_path / "run", max_train_steps=2, disc_start=0)
    train(config, tiny)
    other = dataclasses.replace(config, use_ema=True, max_train_steps=4, resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match="it has no 'averages'"):
        train(other, tiny)
    assert train(config, tiny)["steps"] == 2
    train(dataclasses.replace(other, use_ema=False), tiny)
    with pytest.raises(FileExistsError, match="differs in: max_train_steps"):
        train(config, tiny)


@pytest.mark.parametrize("kind", [VQGANTrainingConfig, LatentDiffusionConfig])
def test_what_makes_another_run(tmp_path, kind):
    """Each setting that changes what is learned, and none that does not."""
    base = {"dataset_name": "user/images", "output_dir": str(tmp_path / "run"), "max_train_steps": 9}
    base |= {"vqgan": "user/model"} if kind is LatentDiffusionConfig else {}
    config = kind(**base)
    with RunFolder(config, None, Accelerator()) as run:
        run.open()
    for field in dataclasses.fields(kind):
        if field.name == "output_dir":
            continue
        changed = dataclasses.replace(config)
        setattr(changed, field.name, another(getattr(config, field.name)))
        expected = [field.name] if role_of(field) == "result" else []
        assert RunFolder(changed, None, Accelerator())._find_differing(forgiving=False) == expected


def another(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return [*value, 7] if isinstance(value, list) else "another"


def test_runs_of_older_versions_go_on(tmp_path):
    """Their files name settings that no longer count, and lack those that have been added since."""
    config = made_run(tmp_path / "run", 3)
    file = tmp_path / "run" / "training_config.yaml"
    lines = [line for line in file.read_text().splitlines() if not line.startswith(("lecam_decay", "logging_steps"))]
    file.write_text("\n".join([*lines, "logging_steps: 77", "cache_dir: /somewhere"]))
    assert open_folder(config) == tmp_path / "run" / "checkpoint-3"
    file.write_text("\n".join([*lines, "lerning_rate: 1"]))
    with pytest.raises(FileExistsError, match="differs in: lerning_rate"):
        open_folder(config)


def test_resuming_an_earlier_checkpoint_keeps_what_it_writes(tmp_path, tiny):
    """Later checkpoints, of another future, used to count: the newest one written was the first to be dropped."""
    config = made_run(tmp_path / "run", 3, 5, 7)
    early = dataclasses.replace(config, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    with RunFolder(early, tiny, Accelerator()) as run:
        assert run.open() == tmp_path / "run" / "checkpoint-3"
        run.save_checkpoint(4, {}, Path.mkdir)
        assert [path.name for path in run.checkpoints()] == [f"checkpoint-{step}" for step in (3, 4, 5, 7)]
        run.save_checkpoint(6, {}, Path.mkdir)
        assert [path.name for path in run.checkpoints()] == [f"checkpoint-{step}" for step in (5, 6, 7)]


# ------------------------------------------------------------------------------------------------ secrets


@pytest.mark.parametrize(
    "config",
    [
        VQGANTrainingConfig("user/images", hub_token="hf_secret"),
        LatentDiffusionConfig(vqgan="user/model", dataset_name="user/images", hub_token="hf_secret"),
        EncodingConfig(hub_token="hf_secret"),
    ],
    ids=lambda config: type(config).__name__,
)
def test_tokens_are_not_shown(config):
    assert "hf_secret" not in repr(config) and "hub_token" not in repr(config)
    if hasattr(config, "output_dir"):
        assert "hf_secret" not in str(hf_vqgan.training.run_folder.public_settings(config))


def test_token_is_in_no_file_and_no_output(image_folder, random_trunk, tmp_path, tiny, capfd, monkeypatch):
    """Trackers included; nor in the error of a push that fails."""
    pytest.importorskip("tensorboard")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    config = run_config(image_folder, random_trunk, tmp_path / "run", max_train_steps=1, quantize_start=0,
                        report_to="tensorboard", push_to_hub=True, hub_model_id="user/name",
                        hub_token="hf_very_secret")  # fmt: skip
    with pytest.raises(Exception, match="Connection refused") as failure:
        train(config, tiny)
    assert "hf_very_secret" not in str(failure.value)
    printed = capfd.readouterr()
    assert "hf_very_secret" not in printed.out + printed.err
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any("tfevents" in path.name for path in files)
    assert not any(b"hf_very_secret" in path.read_bytes() for path in files)


# ------------------------------------------------------------------------------------------------ checkpoints


def cut_back(folder: Path, step: int) -> None:
    """Make a complete run one that has just written checkpoint-`step`."""
    for path in folder.glob("checkpoint-*"):
        if path.name != f"checkpoint-{step}":
            shutil.rmtree(path)


@pytest.mark.parametrize(
    "quantizer",
    [name if name in ("vq_ema", "gumbel") else pytest.param(name, marks=pytest.mark.slow) for name in QUANTIZERS],
)
def test_every_quantizer_resumes_to_the_bit(image_folder, random_trunk, tmp_path, quantizer):
    model = VQGANConfig(**TINY | {"quantizer": quantizer} | SPECIAL.get(quantizer, {}))
    config = run_config(image_folder, random_trunk, tmp_path / "run", streaming=True, use_ema=True, max_train_steps=5,
                        lecam_weight=0.1, checkpoints_total_limit=None, channels_last=True)  # fmt: skip
    train(config, model)
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    cut_back(tmp_path / "again", 2)
    train(dataclasses.replace(config, output_dir=str(tmp_path / "again")), model)
    for file in sorted((tmp_path / "run" / "checkpoint-5").glob("*.safetensors")):
        ours, theirs = load_file(file), load_file(tmp_path / "again" / "checkpoint-5" / file.name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), file.name


def test_checkpoints_hold_no_pickle(image_folder, random_trunk, tmp_path, tiny):
    train(run_config(image_folder, random_trunk, tmp_path / "run", max_train_steps=2, use_ema=True), tiny)
    files = list((tmp_path / "run" / "checkpoint-2").iterdir())
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    json.loads((tmp_path / "run" / "checkpoint-2" / "state.json").read_text(), parse_constant=pytest.fail)
    optimizer = load_file(tmp_path / "run" / "checkpoint-2" / "optimizer.safetensors")
    assert "state.model.decoder.conv_out.weight.exp_avg" in optimizer  # by name


def test_states_come_back_as_they_were(tmp_path):
    """Numbers as keys, tuples, infinities, shared and strided tensors, and types that are not floats."""
    shared = torch.arange(6.0)
    state = {
        "numbers": {1: 2, 3: {"x": (4.0, None, True)}},
        "odd": [float("inf"), 0.1 + 0.2, -0.0, "text", {"$tensor": "not one"}],
        "tensors": [shared, shared[2:], shared.view(2, 3).t(), torch.tensor(3, dtype=torch.uint8)],
        "types": {str(kind): torch.ones(2, 2).to(kind) for kind in (torch.bfloat16, torch.int64, torch.bool)},
        "empty": [{}, [], (), torch.zeros(0)],
    }
    write_states(tmp_path, {"part": state})
    found = read_states(tmp_path)["part"]
    for ours, theirs in zip(state["tensors"], found["tensors"], strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    assert all(torch.equal(tensor, found["types"][kind]) for kind, tensor in state["types"].items())
    assert found["numbers"] == state["numbers"] and found["odd"] == state["odd"] and str(found["odd"][2]) == "-0.0"
    assert found["empty"][:3] == [{}, [], ()] and found["empty"][3].shape == (0,)
    with pytest.raises(TypeError, match="part.x: a checkpoint cannot hold a set"):
        write_states(tmp_path, {"part": {"part": {"x": {1}}}})


class Bits8(torch.optim.Optimizer):
    """Moments in 8 bits with a scale per block, in the order of memory, as bitsandbytes keeps them."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self):
        for parameter in self.param_groups[0]["params"]:
            memory = self.state[parameter]
            memory.setdefault("state1", torch.zeros_like(parameter, dtype=torch.uint8))
            memory.setdefault("absmax1", torch.zeros(-(-parameter.numel() // 4)))
            flat = parameter.as_strided((parameter.numel(),), (1,))
            memory["state1"].as_strided((parameter.numel(),), (1,)).add_((flat.abs() * 50).to(torch.uint8))
            memory["absmax1"] += 1
            flat.sub_(memory["state1"].as_strided((parameter.numel(),), (1,)) * 1e-3)


@pytest.mark.parametrize("kind", ["fused", "8 bits"])
def test_optimizers_that_go_by_memory_resume_to_the_bit(tmp_path, kind):
    """Weights in channels_last, whose moments files do not keep in that order; several parameter groups not needed."""

    def build():
        torch.manual_seed(1)
        layer = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        optimizer = Bits8(layer.parameters()) if kind == "8 bits" else torch.optim.AdamW(layer.parameters(), fused=True)
        return layer, optimizer, NamedOptimizer(optimizer, layer=layer)

    def steps(layer, optimizer, seeds):
        for seed in seeds:
            torch.manual_seed(seed)
            for parameter in layer.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()

    layer, optimizer, part = build()
    steps(layer, optimizer, (1, 2))
    write_states(tmp_path, {"layer": layer.state_dict(), "optimizer": part.state_dict()})
    fresh = build()
    states = read_states(tmp_path)
    fresh[0].load_state_dict(states["layer"])
    fresh[2].load_state_dict(states["optimizer"])
    steps(layer, optimizer, (3, 4))
    steps(*fresh[:2], (3, 4))
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), fresh[0].parameters(), strict=True))


def parts_of(config, tiny):
    accelerator = build_accelerator(config)
    dataset, _ = load_images(config, tiny, accelerator)
    return checkpoint_parts(build_state(config, tiny, accelerator, None), dataset), accelerator


class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def write_old_checkpoint(folder: Path, parts: dict, accelerator: Accelerator) -> None:
    """By Accelerate alone, as before checkpoints had a format of their own."""
    folder.mkdir()
    models = [part for part in parts.values() if isinstance(part, torch.nn.Module)]
    from accelerate.checkpointing import save_accelerator_state

    states = [model.state_dict() for model in models]
    save_accelerator_state(str(folder), states, [], [], [], 0, 0, accelerator.scaler)
    inner = {NamedOptimizer: lambda part: part.optimizer, NamedAverages: lambda part: part.ema}
    others = [part for name, part in parts.items() if part not in models and name != "loss_scale"]
    for number, part in enumerate(others):
        state = inner.get(type(part), lambda part: part)(part).state_dict()
        state.pop("unreadable_images", None)  # was not counted then
        torch.save(state, folder / f"custom_checkpoint_{number}.pkl")
    hf_vqgan.training.run_folder.write_manifest(folder)


def test_older_checkpoints_are_read_without_running_their_pickles(image_folder, random_trunk, tmp_path, tiny):
    config = run_config(image_folder, random_trunk, tmp_path / "run", use_ema=True, streaming=True, max_train_steps=4,
                        checkpoints_total_limit=None)  # fmt: skip
    train(config, tiny)
    folder = tmp_path / "run"
    with RunFolder(config, tiny, Accelerator()) as run:
        parts, accelerator = parts_of(config, tiny)
        run.load_checkpoint(folder / "checkpoint-2", parts)
        write_old_checkpoint(tmp_path / "old", parts, accelerator)
        expected = json.dumps(collect_states(parts, accelerator), default=lambda tensor: tensor.tolist())
        parts, accelerator = parts_of(config, tiny)
        run.load_checkpoint(tmp_path / "old", parts)
        assert json.dumps(collect_states(parts, accelerator), default=lambda tensor: tensor.tolist()) == expected

        for name in ("custom_checkpoint_0.pkl", "random_states_0.pkl"):
            shutil.copytree(tmp_path / "old", tmp_path / "crafted", dirs_exist_ok=True)
            with open(tmp_path / "crafted" / name, "wb") as file:
                pickle.dump({"step": 2, "state": Bomb(tmp_path / "exploded")}, file)
            (tmp_path / "crafted" / "manifest.json").unlink()
            hf_vqgan.training.run_folder.write_manifest(tmp_path / "crafted")
            with pytest.raises(
                ValueError, match=f"cannot resume from .*crafted: .*{name}.*more than tensors and numbers"
            ):
                run.load_checkpoint(tmp_path / "crafted", parts_of(config, tiny)[0])
    cut_back(folder, 2)
    shutil.rmtree(folder / "checkpoint-2")
    shutil.copytree(tmp_path / "crafted", folder / "checkpoint-2")
    for asked in (None, str(tmp_path / "crafted")):
        with pytest.raises(ValueError, match="more than tensors and numbers"):
            train(dataclasses.replace(config, resume_from_checkpoint=asked), tiny)
    assert not (tmp_path / "exploded").exists()


def test_models_to_start_from_are_not_unpickled(image_folder, random_trunk, tmp_path, tiny_model):
    """`init_from` with weights in a pickle."""
    tiny_model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({"x": Bomb(tmp_path / "exploded")}, tmp_path / "model" / "pytorch_model.bin")
    config = run_config(image_folder, random_trunk, tmp_path / "run", init_from=str(tmp_path / "model"))
    with pytest.raises(Exception, match="(?i)weights.only"):
        train(config, tiny_model.config)
    assert not (tmp_path / "exploded").exists()


BIAS = "decoder.conv_out.bias"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda states: states.pop("averages"), "it has no 'averages', which this run has"),
        (lambda states: states["progress"].update(step="7"), "'progress' does not fit .*step: a str instead of a int"),
        (lambda states: states["progress"].pop("health"), "'progress' does not fit this run .KeyError: 'health'"),
        (lambda states: states["model"].update({BIAS: torch.zeros(4)}), r"\(4,\) instead of .*\(3,\)"),
        (lambda states: states["model"].update({BIAS: torch.zeros(3).half()}), "float16.*instead of"),
        (lambda states: states["optimizer"]["groups"][0]["params"].pop(), "'optimizer' .* it trains other parameters"),
        (
            lambda states: states["optimizer"]["state"][f"model.{BIAS}"].update(exp_avg=torch.zeros(1)),
            r"'optimizer' .*conv_out.bias.exp_avg has shape \(1,\)",
        ),
    ],
    ids=["part", "counter", "key", "shape", "dtype", "parameters", "moments"],
)  # fmt: skip
def test_states_that_do_not_fit_are_named(image_folder, random_trunk, tmp_path, tiny, change, message):
    config = run_config(image_folder, random_trunk, tmp_path / "run", use_ema=True)
    parts, accelerator = parts_of(config, tiny)
    for parameter in parts["model"].parameters():
        parameter.grad = torch.zeros_like(parameter)
    parts["optimizer"].optimizer.step()
    states = collect_states(parts, accelerator)
    states = states | {name: dict(states[name]) for name in ("progress", "model")}
    change(states)
    with pytest.raises(ValueError, match=message):
        restore_states(parts_of(config, tiny)[0], states, accelerator)


def test_random_states_of_the_device_come_back(tmp_path, monkeypatch):
    """Every process has one device, whose generator is its own; CPU runs have none."""
    states = [torch.arange(16, dtype=torch.uint8)]
    device = SimpleNamespace(get_rng_state=lambda: states[-1], set_rng_state=states.append)
    monkeypatch.setattr(torch, "get_device_module", lambda _: device)
    on_cpu = SimpleNamespace(process_index=0, device=torch.device("cpu"))
    on_device = SimpleNamespace(process_index=0, device=torch.device("cuda"))
    write_states(tmp_path, collect_states({}, on_device))
    drawn = [random.random(), np.random.rand(), torch.rand(1).item()]
    for accelerator, count in ((on_device, 2), (on_cpu, 2)):
        restore_states({}, read_states(tmp_path), accelerator)
        assert len(states) == count and torch.equal(states[-1], states[0])
        assert [random.random(), np.random.rand(), torch.rand(1).item()] == drawn
    write_states(tmp_path, collect_states({}, on_cpu))
    restore_states({}, read_states(tmp_path), on_device)
    assert len(states) == 2


def test_averages_keep_their_schedule(tmp_path):
    layer = torch.nn.Linear(2, 2)
    ema = EMAModel(layer.parameters(), decay=0.5, use_ema_warmup=True)
    for _ in range(3):
        ema.step(layer.parameters())
    write_states(tmp_path, {"averages": NamedAverages(ema, layer).state_dict()})
    fresh = EMAModel(torch.nn.Linear(2, 2).parameters(), decay=0.5, use_ema_warmup=True)
    NamedAverages(fresh, layer).load_state_dict(read_states(tmp_path)["averages"])
    assert fresh.optimization_step == 3
    assert all(torch.equal(a, b) for a, b in zip(fresh.shadow_params, ema.shadow_params, strict=True))


# ------------------------------------------------------------------------------------------------ damaged files


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"a: !!timestamp b", b"[" * 5000])
def test_damaged_settings_give_one_error(tmp_path, monkeypatch, content):
    config = made_run(tmp_path / "run", 3)
    (tmp_path / "run" / "training_config.yaml").write_bytes(content)
    for overwrite in (False, True):  # which must not delete what may be this very run
        with pytest.raises(ValueError, match=r"training_config.yaml is damaged: .*--resume_from_checkpoint latest"):
            open_folder(dataclasses.replace(config, overwrite_output_dir=overwrite))
    asked = dataclasses.replace(config, resume_from_checkpoint="latest")
    monkeypatch.setattr("hf_vqgan.training.run_folder.restore_states", lambda *args: None)
    with RunFolder(asked, VQGANConfig(**TINY), Accelerator()) as run:
        assert run.open() == tmp_path / "run" / "checkpoint-3"
        run.load_checkpoint(run.folder / "checkpoint-3", {})
    assert open_folder(config) == tmp_path / "run" / "checkpoint-3"  # written anew


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"state.json": 5}', '{"state.json": {"bytes": 1}}', "[" * 100_000, "{}"]
)
def test_damaged_manifest_is_passed_over(tmp_path, content):
    config = made_run(tmp_path / "run", 3, 5)
    (tmp_path / "run" / "checkpoint-5" / "manifest.json").write_text(content)
    assert open_folder(config) == tmp_path / "run" / "checkpoint-3"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_complete_run_without_its_model_is_no_success(image_folder, random_trunk, tmp_path, tiny, name):
    """And the way that the error names does bring it back."""
    config = run_config(image_folder, random_trunk, tmp_path / "run", max_train_steps=4)
    train(config, tiny)
    before = (tmp_path / "run" / name).read_bytes()
    (tmp_path / "run" / name).unlink()
    with pytest.raises(ValueError, match=f"the run is complete, but .*{name} is missing"):
        train(config, tiny)
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    train(config, tiny)
    assert (tmp_path / "run" / name).read_bytes() == before


def test_damaged_log_and_metrics(tmp_path, tiny, caplog):
    config = made_run(tmp_path / "run", 3)
    row = b'{"step": 1, "l1": 0.5}\n'
    huge = b'{"step": 1%s}\n' % (b"0" * 400)
    bad = [b"\0\0\0\n", b"{\n", b"5\n", b'{"l1": 1}\n', b'{"step": "x"}\n', b'{"step": NaN}\n', b"\xff\n", huge]
    bad.append(b"[" * 99_999 + b"\n")
    (tmp_path / "run" / "log.jsonl").write_bytes(row + b"".join(bad) + row + b'{"step": 2')
    with RunFolder(config, tiny, Accelerator()) as run:
        run.truncate_log(5)
        assert run.read_log() == [{"step": 1, "l1": 0.5}] * 2
        assert "9 damaged lines of 11 are left out" in caplog.text
        for content in ("", "[]", "{", '{"psnr": NaN}'):
            (tmp_path / "run" / "metrics.json").write_text(content)
            with pytest.raises(ValueError, match=r"metrics.json .*To measure again, delete its last checkpoint"):
                run.read_metrics()
