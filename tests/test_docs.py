"""
Every command and Python block of docs/ runs here as it is written, or says in a line of its own above it what it needs
and a test has not got: `*Needs a GPU.*`. A block that does neither fails.

The blocks of a page run in order, in a folder that has what the page's reader has: images under the names that
a page gives to a dataset, models under those that it gives to a model. Commands run in this process, with the flags of
SMALL.
"""

import re
import shlex
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import TINY, photo
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from test_pipelines import amused, tiny_unet

from hf_vqgan import VQGANConfig, VQGANImageProcessor, VQGANLatentDiffusionPipeline, VQGANModel, cli

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
NEEDS = re.compile(r"\*Needs .+\.\*")

MODEL = "--block_out_channels 8 16 --layers_per_block 1 --norm_num_groups 4 --latent_channels 8 --vq_embed_dim 4 \
    --down_block_types DownEncoderBlock2D DownEncoderBlock2D --up_block_types UpDecoderBlock2D UpDecoderBlock2D"
SMALL = {
    "train": f"{MODEL} --resolution 32 --resize 40 --train_batch_size 2 --max_train_steps 2 \
        --quantize_start 1 --disc_start 1 --disc_channels 8 --disc_layers 1 \
        --latent_statistics_images 8 --crops_per_image 1 \
        --perceptual_weights_path LPIPS/alex.safetensors --cpu_threads 1 --dataloader_num_workers 0",
    "evaluate": "--max_samples 2 --resolution 32 --alex_weights_path LPIPS/alex.safetensors \
        --vgg_weights_path LPIPS/vgg.safetensors --inception false --cpu_threads 1",
    "encode": "--cpu_threads 1",
    "evaluate-generation": "--num_samples 6 --num_inference_steps 2 --resolution 32 --features lpips_alex \
        --alex_weights_path LPIPS/alex.safetensors --cpu_threads 1",
    "train-diffusion": "--block_out_channels 8 16 --layers_per_block 1 --norm_num_groups 4 \
        --train_batch_size 4 --attention_head_dim 8 --max_train_steps 2 --sample_images 3 --sample_inference_steps 2 \
        --cpu_threads 1",
    "train-tokens": "--hidden_size 16 --num_layers 1 --num_attention_heads 2 --train_batch_size 4 \
        --max_train_steps 2 --sample_images 2 --sample_inference_steps 2 --cpu_threads 1",
    "analyze": "--split train --resolution 32 --max_samples 8 --path_steps 3 --lipschitz_images 2 \
        --lipschitz_iterations 2 --consistency_contexts 2 --consistency_codes 4 --diffusion_steps 2 \
        --perceptual_weights_path LPIPS/alex.safetensors",
    "convert": "",
    "app": "",
}


class Block(NamedTuple):
    language: str
    code: str
    needs: str | None


def read_blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page that have a language."""
    found, above = [], ""
    lines = iter(page.read_text().splitlines())
    for line in lines:
        if line.lstrip().startswith("```"):
            code = []
            for inside in lines:
                if inside.lstrip().startswith("```"):
                    break
                code.append(inside)
            if language := line.strip().removeprefix("```"):
                found.append(Block(language, "\n".join(code), NEEDS.fullmatch(above) and above))
        above = line.strip() or above
    return found


@pytest.fixture
def reader(tmp_path, monkeypatch, random_trunk):
    """The folder in which a reader of the documentation works."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_vqgan.commands.launcher.default_config_file", "")  # what `accelerate config` has written
    Path("LPIPS").symlink_to(random_trunk)
    return tmp_path


def save_images(folder: str, classes: list[str]) -> None:
    """A dataset folder with 4 training and 1 test image of each class."""
    for split, count in (("train", 4), ("test", 1)):
        for row, name in enumerate(classes):
            path = Path(folder, split, name)
            path.mkdir(parents=True)
            for number in range(1, 1 + count):
                photo(10 * row + number + 100 * (split == "test")).save(path / f"{number}.jpg")


def save_model(*folders: str) -> VQGANModel:
    """A small untrained model whose codes are spread, and its processor."""
    model = VQGANModel(VQGANConfig(**TINY | {"sample_size": 32}))
    torch.nn.init.normal_(model.quantize.embedding.weight, std=0.5)
    for folder in folders:
        model.save_pretrained(folder)
        VQGANImageProcessor(size_divisor=2).save_pretrained(folder)
        Path(folder, "README.md").write_text("# A model\n")
    return model


# ---------------------------------------------------------------------------------------------------------------------
# What a page takes to be there: files in the reader's folder, and names in Python


def given_tutorial() -> dict:
    save_images("photos", ["cats", "dogs"])
    return {}


def given_training() -> dict:
    save_images("user/images", ["cats", "dogs"])
    Path("recipe.yaml").write_text("dataset_name: user/images\noutput_dir: runs/recipe\nperceptual_net: alex\n")
    return {}


def given_evaluation() -> dict:
    save_images("DATASET", ["cats", "dogs"])
    save_model("MODEL", "runs/a", "owner/b")
    blocks = dict(down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)
    AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, **blocks).save_pretrained("owner/sd/vae")
    return {}


def given_generation_evaluation() -> dict:
    save_images("DATASET", ["cats", "dogs"])
    for folder in ("runs/diffusion", "runs/a"):
        pipeline = VQGANLatentDiffusionPipeline(save_model(), tiny_unet(2), FlowMatchEulerDiscreteScheduler())
        pipeline.save_pretrained(folder)
    save_images("samples", ["anything"])
    np.savez("REFERENCE.npz", np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8))
    return {}


def given_checkpoints() -> dict:
    taming = {"block_out_channels": (32, 32), "norm_num_groups": 32, "num_used_codes": 16}
    model = VQGANModel(VQGANConfig(**TINY | taming))
    tensors, _ = model.to_original("taming")
    torch.save({"state_dict": tensors}, "last.ckpt")
    return {"pixel_values": torch.rand(1, 3, 16, 16) * 2 - 1}


def given_diffusers() -> dict:
    save_images("user/images", ["bird", "cat", "dog"])
    return {"pipeline": amused(save_model("runs/mine")), "pixel_values": torch.rand(1, 3, 32, 160) * 2 - 1}


def given_latent_space() -> dict:
    save_images("DATASET", ["cats", "dogs"])
    save_model("MODEL", "A", "B", "C")
    Path("runs").mkdir()
    for name, report in (("latent_space_a", "latent_space"), ("latent_space_b", "latent_space/B")):
        Path("runs", name).symlink_to(report)
    return {}


def given_tokens() -> dict:
    save_images("user/images", ["cats", "dogs"])
    save_model("runs/mine")
    return {}


GIVEN = {
    "tutorial": given_tutorial,
    "training": given_training,
    "evaluation": given_evaluation,
    "generation_evaluation": given_generation_evaluation,
    "checkpoints": given_checkpoints,
    "diffusers": given_diffusers,
    "latent_space": given_latent_space,
    "tokens": given_tokens,
}


# ---------------------------------------------------------------------------------------------------------------------


def run_command(command: list[str], monkeypatch) -> None:
    if command[:2] == ["pip", "install"]:
        setup = ConfigParser()
        setup.read(ROOT / "setup.cfg")
        (extras,) = re.findall(r"^\.\[([\w,]+)\]$", command[-1])
        assert set(extras.split(",")) <= set(setup["options.extras_require"])
        return
    assert command[0] == "hf-vqgan", f"no way to run {shlex.join(command)} in a test: say above the block what it needs"
    name, *arguments = command[1:]
    if name == "analyze" and "--measures" not in arguments:
        arguments += ["--measures", "smoothness", "robustness"]  # all of them: tests/test_latent_space.py
    monkeypatch.setattr(sys, "argv", ["hf-vqgan"])
    cli.main([name, *arguments, *shlex.split(SMALL[name])])


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")  # transformers' Trainer, on CPU
@pytest.mark.parametrize("page", [page for page in PAGES if read_blocks(page)], ids=lambda page: page.stem)
def test_blocks_run_or_say_what_they_need(page, reader, monkeypatch):
    blocks = [block for block in read_blocks(page) if not block.needs]
    names = GIVEN[page.stem]() if page.stem in GIVEN else {}
    for block in blocks:
        assert block.language in ("bash", "python"), block
        if block.language == "python":
            exec(compile(block.code, page.name, "exec"), names)
        else:
            for line in block.code.replace("\\\n", "").splitlines():
                if command := shlex.split(line, comments=True):
                    run_command(command, monkeypatch)


def test_site_builds_without_a_warning(tmp_path):
    """Links and anchors between pages, the reference page of every module; and nothing comes from other hosts."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    modules = {".".join(file.relative_to(ROOT).with_suffix("").parts) for file in ROOT.glob("hf_vqgan/**/[!_]*.py")}
    assert {file.stem for file in (tmp_path / "api").glob("*.html")} == modules
    page = tmp_path / "api" / "hf_vqgan.measurement.latent_space.html"
    assert "Perceptual path length" in page.read_text()
    for file in tmp_path.rglob("*.html"):
        assert not re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"(?:https?:)?//", file.read_text()), file
