"""
Kill a run at random moments, run the same command again each time, and get the uninterrupted run's result to the bit.

Each run is a process of its own, forked from a server that has imported everything, so that a kill costs no new import.
"""

import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file

from hf_vqgan import VQGANConfig
from hf_vqgan.training.configuration import VQGANTrainingConfig
from hf_vqgan.training.run_folder import find_damage
from hf_vqgan.training.tokenizer import train

RUN = dict(
    resolution=32,
    resize=40,
    train_batch_size=4,
    learning_rate=1e-3,
    quantize_start=1,
    dead_code_restart_steps=2,
    use_ema=True,
    lr_scheduler="cosine",
    perceptual_net="alex",
    disc_start=2,
    disc_channels=8,
    disc_layers=1,
    diff_augment=["color"],
    lecam_weight=0.1,
    logging_steps=1,
    gradient_report_steps=3,
    checkpointing_steps=1,
    latent_statistics_images=4,
    cpu_threads=1,
    dataloader_num_workers=0,
)

# Everything with a state of its own, in half precision
BF16 = dict(
    mixed_precision="bf16",
    streaming=True,
    shuffle_buffer_size=5,
    train_batch_size=2,
    gradient_accumulation_steps=2,
    disc_type="stylegan",
    r1_weight=1.0,
    r1_interval=2,
    adversarial_gradient_at_z=0.5,
    diff_augment=[],
)


def run(fields: dict, errors: str) -> None:
    """In the child: train, with its output in a file."""
    with open(errors, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        train(VQGANTrainingConfig(**fields), VQGANConfig(**TINY))


@pytest.fixture(scope="module")
def server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_vqgan.training.tokenizer"])
    return context


class Killer:
    """Starts runs, kills them at a random moment or while they write a checkpoint, and counts which."""

    def __init__(self, server, fields: dict, errors: Path, seed: int = 0):
        self.server, self.fields, self.errors = server, fields, errors
        self.random = random.Random(seed)
        self.killed = {"at random": 0, "while writing a checkpoint": 0}

    def start(self) -> multiprocessing.Process:
        process = self.server.Process(target=run, args=(self.fields, str(self.errors)))
        process.start()
        return process

    def finish(self) -> None:
        process = self.start()
        process.join(120 + 2 * self.fields["max_train_steps"])
        assert process.exitcode == 0, self.errors.read_text()[-3000:]

    def kill(self, kind: str, seconds: float) -> None:
        """Kill a run that has got past a new checkpoint, `seconds` at most later; a run that is over does not count."""
        folder = Path(self.fields["output_dir"])
        process = self.start()
        before = newest(folder)
        while process.is_alive() and newest(folder) == before:
            time.sleep(0.005)
        if kind == "at random":
            process.join(self.random.uniform(0, seconds))
        else:
            while process.is_alive() and not list(folder.glob(".checkpoint-*.tmp/*")):
                time.sleep(0.0005)
            process.join(self.random.uniform(0, 0.02))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            self.killed[kind] += 1
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), self.errors.read_text()[-3000:]


def newest(folder: Path) -> int:
    return max((int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")), default=0)


def log_without_clock(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in row.items() if name not in ("images_per_second", "data_wait")} for row in rows
    ]


@pytest.mark.parametrize("options", [{}, BF16], ids=["files", "bf16_stream"])
@pytest.mark.parametrize(
    "steps, kills", [(24, 6), pytest.param(1000, 20, marks=pytest.mark.slow)], ids=["short", "soak"]
)
def test_killed_run_ends_as_the_uninterrupted_one(server, image_folder, random_trunk, tmp_path, steps, kills, options):
    fields = (
        RUN
        | options
        | {
            "dataset_name": str(image_folder),
            "max_train_steps": steps,
            "validation_steps": steps // 2,
            "perceptual_weights_path": str(random_trunk / "alex.safetensors"),
        }
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    started = time.perf_counter()
    Killer(server, fields | {"output_dir": str(whole)}, tmp_path / "whole.log").finish()
    took = time.perf_counter() - started

    killer = Killer(server, fields | {"output_dir": str(killed)}, tmp_path / "killed.log")
    for number in range(kills):
        killer.kill(("at random", "while writing a checkpoint")[number % 2], took / kills / 2)
    killer.finish()
    print(f"{steps} steps, killed {killer.killed}")
    assert sum(killer.killed.values()) >= kills - 1 and min(killer.killed.values()) >= kills // 2 - 1

    ours, theirs = (load_file(folder / "model.safetensors") for folder in (whole, killed))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)
    assert log_without_clock(whole) == log_without_clock(killed)
    assert {path.name for path in killed.iterdir()} == {path.name for path in whole.iterdir()}  # no leftovers


def test_ctrl_c_in_a_terminal_with_two_processes(image_folder, random_trunk, tmp_path):
    """A terminal sends it to all that it has started, and the launcher passes it on: one is saved, once."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    fields = RUN | TINY | {
        "dataset_name": image_folder,
        "output_dir": tmp_path / "run",
        "perceptual_weights_path": random_trunk / "alex.safetensors",
        "max_train_steps": 1000,
        "checkpointing_steps": 1000,
        "dataloader_num_workers": 1,
        "config": "none",
    }  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    command += [str(Path(__file__).parent.parent.parent / "scripts" / "train_vqgan.py")]
    for name, value in fields.items():
        command += [f"--{name}", *(map(str, value) if isinstance(value, (list, tuple)) else [str(value)])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    with open(tmp_path / "log", "w+") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        while process.poll() is None and not (tmp_path / "run" / "log.jsonl").is_file():
            time.sleep(0.1)
        while process.poll() is None and len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) < 2:
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        process.wait(timeout=120)
        log.seek(0)
        printed = log.read()
    (checkpoint,) = (tmp_path / "run").glob("*checkpoint-*")
    step = newest(tmp_path / "run")
    assert step >= 2 and find_damage(checkpoint) is None
    assert printed.count("Ctrl-C: saving after this step") == 1
    assert f"saved step {step}. The same command goes on from there." in printed
