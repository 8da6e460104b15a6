"""Two processes that see four images each do what one does that sees eight: the real script, launched for real."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SPECIAL, TINY
from in_float64 import to_pixel_values
from PIL import Image
from safetensors.torch import load_file

from hf_vqgan import VQGANConfig
from hf_vqgan.evaluation.comparison import EvaluationConfig, evaluate
from hf_vqgan.evaluation.generation import GenerationConfig, evaluate_generation
from hf_vqgan.training.configuration import VQGANTrainingConfig
from hf_vqgan.training.tokenizer import train

SCRIPTS = Path(__file__).parent.parent.parent / "scripts"


def launch(arguments: dict, script: str = "train_vqgan.py", names: tuple[str, ...] = (), float64: bool = True) -> None:
    """A script under `accelerate launch` with two gloo processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    wrapper = [str(Path(__file__).parent / "in_float64.py")] if float64 else []
    command += ["--main_process_port", str(port), *wrapper, str(SCRIPTS / script), *names, "--config", "none"]
    for name, value in arguments.items():
        command += [f"--{name}", *(map(str, value) if isinstance(value, (list, tuple)) else [str(value)])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture
def float64(monkeypatch):
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr("hf_vqgan.data.datasets.to_pixel_values", to_pixel_values)
    yield
    torch.set_default_dtype(torch.float32)


# What is tried beside the quantizer, so that everything which processes have to agree on is in some run.
OPTIONS = {
    "vq": {"use_ema": True, "diff_augment": ["color", "translation", "cutout"], "lecam_weight": 0.1, "r1_weight": 1.0},
    "vq_ema": {"dead_code_restart_steps": 2, "use_ema": True},
    "simvq": {"disc_type": "stylegan", "r1_weight": 1.0, "r1_interval": 2},
}


@pytest.mark.parametrize("quantizer", ["vq", "vq_ema", "simvq", "residual", "fsq"])
def test_two_processes_equal_one(image_folder, random_trunk, tmp_path, float64, quantizer):
    (image_folder / "train" / "05.png").write_bytes(b"broken")
    model = (
        TINY
        | {"quantizer": quantizer, "num_vq_embeddings": 256 if quantizer == "vq_ema" else 64}
        | SPECIAL.get(quantizer, {})
    )

    training = OPTIONS.get(quantizer, {}) | dict(
        dataset_name=str(image_folder),
        resolution=32,
        resize=40,
        max_train_steps=8,
        learning_rate=3e-3,
        perceptual_net="alex",
        validation_net="alex",
        perceptual_weights_path=str(random_trunk / "alex.safetensors"),
        disc_start=2,
        disc_channels=8,
        disc_layers=1,
        logging_steps=1,
        gradient_report_steps=0
        if quantizer == "vq_ema"
        else 3,  # it looks at one micro-batch, of which that one has two
        latent_statistics_images=40,
        streaming=quantizer == "simvq",
        cpu_threads=1,
    )
    one, two = tmp_path / "one", tmp_path / "two"
    train(VQGANTrainingConfig(**training, train_batch_size=8, output_dir=str(one)), VQGANConfig(**model))
    # two processes with two micro-batches of two images for one of the quantizers, with one of four for the others
    micro_batches = 2 if quantizer == "vq_ema" else 1
    batch = {"train_batch_size": 4 // micro_batches, "gradient_accumulation_steps": micro_batches}
    launch(training | model | batch | {"output_dir": two})
    logs = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (one, two)]
    timings = ("images_per_second", "data_wait")
    for rows in zip(*logs, strict=True):
        ours, theirs = ({k: v for k, v in row.items() if k not in timings} for row in rows)
        assert theirs == pytest.approx(ours, rel=1e-6, abs=1e-9)
    if quantizer == "vq_ema":
        assert any(row.get("restarted_codes") for row in logs[0])  # or the test would not see restarts
    metrics = [json.loads((run / "metrics.json").read_text()) for run in (one, two)]
    assert metrics[1]["scaling_factor"] == pytest.approx(metrics[0]["scaling_factor"], rel=1e-6)
    assert [found["unreadable_images"] for found in metrics] == [1, 1]  # met in several epochs, by both processes
    weights = [load_file(run / "model.safetensors") for run in (one, two)]
    for name in weights[0]:
        torch.testing.assert_close(weights[1][name], weights[0][name], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_each_network_s_gradients_are_exchanged_once_a_step(image_folder, random_trunk, mixed_precision):
    """With accumulation too: the passes whose gradient stops at the reconstruction must not make DDP expect more."""
    folder = Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(folder / "count_reductions.py"), str(image_folder), str(random_trunk / "alex.safetensors")]
    paths = os.pathsep.join([str(folder.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": paths}
    done = subprocess.run([*command, mixed_precision], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"model": 1, "discriminator": 1}


def test_two_processes_resume_to_the_bit(image_folder, random_trunk, tmp_path):
    """With a quantizer whose codes are drawn from the random state of each process."""
    training = TINY | {"quantizer": "gumbel"} | dict(
        dataset_name=image_folder,
        resolution=32,
        resize=40,
        train_batch_size=2,
        max_train_steps=4,
        checkpointing_steps=2,
        perceptual_net="alex",
        perceptual_weights_path=random_trunk / "alex.safetensors",
        disc_channels=8,
        disc_layers=1,
        use_ema=True,
        latent_statistics_images=0,
        cpu_threads=1,
    )  # fmt: skip
    launch(training | {"output_dir": tmp_path / "run"}, float64=False)
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoint-4")
    launch(training | {"output_dir": tmp_path / "again"}, float64=False)
    whole, again = (tmp_path / name / "checkpoint-4" for name in ("run", "again"))
    for file in whole.glob("*.safetensors"):
        ours, theirs = load_file(file), load_file(again / file.name)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs), file.name
    assert load_file(whole / "random.safetensors").keys() == {"0.torch", "1.torch"}


def test_evaluation_by_two_processes_equals_one(tiny_model, image_folder, random_trunk, tmp_path):
    """Nor, but for float32 rounding, do the batch size and an image that cannot be read matter."""
    (image_folder / "train" / "04.png").write_bytes(b"not an image")
    tiny_model.save_pretrained(tmp_path / "model")
    names = (str(tmp_path / "model"), str(image_folder))
    options = dict(
        split="train", resolution=32, lpips=["alex"], alex_weights_path=str(random_trunk / "alex.safetensors")
    )
    one = evaluate([names[0]], names[1], EvaluationConfig(**options, inception=False, output_dir=str(tmp_path / "one")))
    two = options | {"inception": "false", "batch_size": 5, "output_dir": tmp_path / "two", "cpu_threads": 1}
    launch(two, "evaluate_vqgan.py", names, float64=False)
    two = json.loads((tmp_path / "two" / "evaluation.json").read_text())
    assert (two["protocol"]["processes"], two["num_images"], two["protocol"]["unreadable_images"]) == (2, 11, 1)
    assert two["protocol"]["pixels_sha256"] == one["protocol"]["pixels_sha256"]
    for ours, theirs in zip(one["models"] + one["anchors"], two["models"] + two["anchors"], strict=True):
        for part in (None, "standard_errors", "details"):
            expected, found = (row[part] if part else row for row in (ours, theirs))
            names = [name for name, value in expected.items() if isinstance(value, (int, float))]
            assert {name: found[name] for name in names} == pytest.approx({n: expected[n] for n in names}, rel=5e-6)
        assert theirs["details"].get("weights_sha256") == ours["details"].get("weights_sha256")
    assert (tmp_path / "two" / "comparison.png").read_bytes() == (tmp_path / "one" / "comparison.png").read_bytes()


@pytest.mark.filterwarnings("ignore:.*torch_dtype.*:FutureWarning")
def test_generated_images_by_two_processes_equal_those_of_one(tiny_pipeline, image_folder, backbone, tmp_path):
    """Samples and figures, with batches that do not come out even and a real image that cannot be read."""
    (image_folder / "train" / "04.png").write_bytes(b"not an image")
    tiny_pipeline.save_pretrained(tmp_path / "pipeline")
    names = (str(tmp_path / "pipeline"),)
    options = dict(
        dataset_name=str(image_folder), features=[backbone], num_samples=11, num_inference_steps=2,
        guidance_scale=[1.0, 3.0], pictures=11, cpu_threads=1,
    )  # fmt: skip
    evaluate_generation(list(names), GenerationConfig(**options, output_dir=str(tmp_path / "one")))
    launch(options | {"batch_size": 3, "output_dir": tmp_path / "two"}, "evaluate_generation.py", names, float64=False)
    one, two = (json.loads((tmp_path / name / "generation.json").read_text()) for name in ("one", "two"))
    assert (two["protocol"]["processes"], two["protocol"]["num_reference_images"]) == (2, 11)
    for ours, theirs in zip([*one["pipelines"], one["held_out"]], [*two["pipelines"], two["held_out"]], strict=True):
        figures = {name for name, value in ours.items() if isinstance(value, (int, float))} - {"samples_per_second"}
        expected = {name: ours[name] for name in figures}
        assert {name: theirs[name] for name in figures} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    pictures = [Image.open(tmp_path / name / "samples.png") for name in ("one", "two")]
    differences = np.abs(np.subtract(*(np.asarray(picture, dtype=int) for picture in pictures)))
    assert differences.max() <= 1  # a level, where rounding falls on the other side
