"""Two processes that see four images each do what one that sees eight does: the real script, launched for real."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SPECIAL, TINY
from safetensors.torch import load_file

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "train_vqgan.py"


def launch(processes: int, arguments: dict, output_dir: Path) -> None:
    flags = [str(SCRIPT), "--config", "none", "--output_dir", str(output_dir)]
    for name, value in arguments.items():
        flags += [f"--{name}", *(map(str, value) if isinstance(value, (list, tuple)) else [str(value)])]
    command = [sys.executable, *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--main_process_port", str(port),
                   "--num_processes", str(processes), *flags]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("quantizer", ["vq", "vq_ema", "simvq", "residual", "fsq"])
def test_two_processes_equal_one(image_folder, random_trunk, tmp_path, quantizer):
    arguments = dict(
        dataset_name=image_folder,
        resolution=32,
        resize=40,
        max_train_steps=6,
        # Adam turns rounding noise of vanishing gradients into full steps; a larger ε keeps noise small.
        adam_epsilon=1e-4,
        learning_rate=1e-3,
        quantize_start=1,
        dead_code_restart_steps=1,
        perceptual_net="alex",
        validation_net="alex",
        perceptual_weights_path=random_trunk / "alex.safetensors",
        disc_start=2,
        disc_channels=8,
        disc_layers=1,
        logging_steps=1,
        cpu_threads=1,
        quantizer=quantizer,
        **TINY | {"num_vq_embeddings": 64} | SPECIAL.get(quantizer, {}),
    )
    launch(1, arguments | {"train_batch_size": 8}, tmp_path / "one")
    launch(2, arguments | {"train_batch_size": 4}, tmp_path / "two")
    logs = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    for one, two in zip(*logs, strict=True):
        one.pop("images_per_second", None), two.pop("images_per_second", None)
        assert two == pytest.approx(one, rel=2e-3, abs=1e-5)
    if quantizer == "vq_ema":
        assert sum(row.get("restarted_codes", 0) for row in logs[0]) > 0  # or the test would not see restarts
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(
            weights[1][name], tensor, rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
