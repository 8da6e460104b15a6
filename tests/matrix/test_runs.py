"""
The real script with every pair of settings, from the first step to a model that loads again.

Each run passes the start of the quantizer and of the discriminator, a report of gradients, a validation, a checkpoint,
a kill, its resumption, and the last save; it has to end as it does uninterrupted, to the bit. Three bugs that hundreds
of tests of one setting at a time had missed were pairs: bf16 with a gradient report was one of them.
"""

import math
from multiprocessing.context import BaseContext
from pathlib import Path

import pytest
import torch
import yaml
from conftest import SPECIAL, TINY, photo
from launcher import SCRIPTS, Launcher, as_flags, read_log, start_server
from pairs import all_pairs, random_rows
from safetensors.torch import load_file

from hf_vqgan import QUANTIZERS, VQGANConfig, VQGANModel

RECIPES = sorted((SCRIPTS / "recipes").glob("*.yaml"))

# Small, and with everything happening within six steps
BASE = {
    "config": "none",
    "resolution": 32,
    "resize": 40,
    "train_batch_size": 4,
    "max_train_steps": 6,
    "learning_rate": 1e-3,
    "lr_scheduler": "cosine",
    "dead_code_restart_steps": 2,
    "perceptual_net": "alex",
    "disc_start": 2,
    "disc_channels": 8,
    "disc_layers": 1,
    "logging_steps": 1,
    "gradient_report_steps": 2,
    "validation_steps": 3,
    "checkpointing_steps": 2,
    "latent_statistics_images": 4,
    "cpu_threads": 1,
}

# What each value of each factor adds to that. The first value is the cheap one.
FACTORS: dict[str, dict[str, dict]] = {
    "quantizer": {name: {"quantizer": name} | SPECIAL.get(name, {}) for name in QUANTIZERS},
    "precision": {"float32": {}, "bf16": {"mixed_precision": "bf16"}},
    "processes": {"1": {}, "2": {}},
    "accumulation": {"1": {}, "2": {"gradient_accumulation_steps": 2, "train_batch_size": 2}},
    "memory": {"plain": {}, "checkpointing": {"gradient_checkpointing": True}},
    "averages": {"none": {}, "ema": {"use_ema": True}},
    "discriminator": {
        "patchgan": {},
        "none": {"adversarial_weight": 0.0},
        "stylegan": {"disc_type": "stylegan"},
        "dino": {"disc_type": "dino"},
    },
    "aid": {
        "none": {},
        "r1": {"r1_weight": 1.0, "r1_interval": 2},
        "lecam": {"lecam_weight": 0.1},
        "augment": {"diff_augment": ["color", "translation", "cutout"]},
    },
    "balance": {"adaptive": {}, "fixed": {"adaptive_weight": False, "adversarial_loss": "non_saturating"}},
    "at_z": {"whole": {}, "half": {"adversarial_gradient_at_z": 0.5}, "cut": {"adversarial_gradient_at_z": 0.0}},
    "latents": {
        "plain": {},
        "equivariance": {"equivariance_share": 0.5, "equivariance_transforms": ["rotate"]},
        "noise": {"latent_noise_std": 0.1},
        "alignment": {"alignment_weight": 0.5},
    },
    "data": {"files": {}, "stream": {"streaming": True, "shuffle_buffer_size": 5}},
    "workers": {"0": {"dataloader_num_workers": 0}, "1": {"dataloader_num_workers": 1}},
    "start": {"quantized": {}, "autoencoder": {"quantize_start": 1}},
    "backbone": {"vqgan": {}, "maskgit": {"backbone": "maskgit", "latent_channels": 4}},
    "layout": {"channels_last": {}, "contiguous": {"channels_last": False}},
}

# Without a discriminator there is nothing for these to act on.
IMPOSSIBLE = frozenset(
    frozenset({("discriminator", "none"), other})
    for other in (("aid", "r1"), ("aid", "lecam"), ("aid", "augment"), ("balance", "fixed"), ("at_z", "half"),
                  ("at_z", "cut"))
)  # fmt: skip

ROWS = all_pairs(FACTORS, IMPOSSIBLE)
MORE_ROWS = random_rows(FACTORS, IMPOSSIBLE, 100, seed=1)


@pytest.fixture(scope="module")
def server() -> BaseContext:
    return start_server()


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """An imagefolder with 12 training and 2 validation images, upright and lying down."""
    folder = tmp_path_factory.mktemp("images")
    for split, count in (("train", 12), ("validation", 2)):
        (folder / split).mkdir()
        for number in range(count):
            size = (48, 40) if number % 2 else (40, 56)
            photo(number + 100 * (split == "validation"), size).save(folder / split / f"{number:02d}.png")
    return folder


def describe(row: dict[str, str]) -> str:
    return "-".join(row[name] for name in FACTORS if row[name] != next(iter(FACTORS[name]))) or "plain"


def settings(row: dict[str, str], images: Path, trunk: Path, backbone: str) -> dict:
    chosen = TINY | BASE
    for name, value in row.items():
        chosen |= FACTORS[name][value]
    local = {"dataset_name": images, "perceptual_weights_path": trunk / "alex.safetensors", "disc_backbone": backbone,
             "alignment_model": backbone}  # fmt: skip
    return chosen | local


def check_run(server: BaseContext, arguments: dict, processes: int, folder: Path) -> tuple[list[dict], VQGANModel]:
    """
    Run the script to its end, and again with a kill in between: both have to end in the same weights and the same log.

    Returns:
        The log, and the model as a user loads it.
    """
    whole, killed = folder / "whole", folder / "killed"
    flags = as_flags(arguments)
    uninterrupted, interrupted = (
        Launcher(
            server, "train_vqgan.py", [*flags, "--output_dir", str(run)], processes, folder / f"{run.name}.log", draw
        )
        for run, draw in ((whole, True), (killed, False))
    )
    uninterrupted.finish()
    interrupted.kill_when(lambda: (killed / "checkpoint-2").exists())
    interrupted.finish()
    assert "Resuming from" in interrupted.output()

    expected, found = (load_file(run / "model.safetensors") for run in (whole, killed))
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert read_log(whole) == read_log(killed)
    assert {path.name for path in whole.iterdir()} == {path.name for path in killed.iterdir()}
    return read_log(whole), VQGANModel.from_pretrained(whole).eval()


def check_log(rows: list[dict], arguments: dict) -> None:
    """Every step was taken, the discriminator started, and gradients were measured at every place."""
    steps = {row["step"]: row for row in rows if "grad_norm" in row}
    assert list(steps) == list(range(1, arguments["max_train_steps"] + 1))
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert all(row["nonfinite_steps"] == 0 and row["grad_norm"] > 0 for row in steps.values())
    assert steps[6]["perplexity"] >= 1
    reports = {row["step"]: row for row in rows if any(name.startswith("gradient_z_") for name in row)}
    assert sorted(reports) == [2, 4, 6]
    assert all(reports[6][f"gradient_{place}_perceptual"] > 0 for place in ("x_hat", "z", "encoder_first"))
    if arguments.get("adversarial_weight") == 0:
        assert "adversarial" not in steps[6] and "gradient_x_hat_adversarial" not in reports[6]
        return
    assert "adversarial" not in steps[2] and steps[3]["disc_grad_norm"] > 0
    assert reports[6]["gradient_x_hat_adversarial"] > 0
    arrives = arguments.get("adversarial_gradient_at_z", 1) > 0
    assert ("gradient_z_adversarial" in reports[6]) == arrives


def check_model(model: VQGANModel) -> None:
    """What was trained encodes, decodes, and gives the same by its two ways to a reconstruction."""
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        indices = model.encode_indices(pixels)
        sample, through_codes = model(pixels).sample, model.decode_indices(indices).sample
    assert sample.shape == pixels.shape and torch.equal(sample, through_codes)
    assert model.config.scaling_factor != 1.0
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


@pytest.mark.parametrize(
    "row", [*ROWS, *(pytest.param(row, marks=pytest.mark.slow) for row in MORE_ROWS)], ids=describe
)
def test_run(server, row, images, random_trunk, backbone, tmp_path):
    arguments = settings(row, images, random_trunk, backbone)
    rows, model = check_run(server, arguments, int(row["processes"]), tmp_path)
    check_log(rows, arguments)
    check_model(model)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_recipe_in_its_own_precision(server, recipe, images, random_trunk, backbone, tmp_path):
    """Quantizer, losses, schedules and precision are the recipe's; networks, images and run are small."""
    its_own = yaml.safe_load(recipe.read_text())
    network = {name: value for name, value in TINY.items() if name not in ("num_vq_embeddings", "sample_size")}
    levels = len(its_own.get("block_out_channels", VQGANConfig().block_out_channels))
    network |= {"block_out_channels": (8,) * levels, "num_vq_embeddings": 64}
    small = {name: value for name, value in BASE.items() if name not in ("lr_scheduler", "dead_code_restart_steps")}
    starts = {"quantize_start": 1 if its_own.get("quantize_start") else 0, "disc_ramp_steps": 0}
    net = its_own.get("perceptual_net", "vgg")
    local = {"dataset_name": images, "disc_backbone": backbone, "config": recipe,
             "perceptual_net": net, "validation_net": net,
             "perceptual_weights_path": random_trunk / f"{net}.safetensors"}  # fmt: skip
    rows, model = check_run(server, network | small | starts | local, 1, tmp_path)
    assert model.config.quantizer == its_own.get("quantizer", "vq")
    check_log(rows, its_own | small)
    check_model(model)
