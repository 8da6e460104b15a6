"""What `pip install hf_vqgan` brings: the wheel, installed by itself, works outside the repository."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import TINY

ROOT = Path(__file__).parent.parent
SOURCES = ("setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")


def can_build() -> bool:
    try:
        return int(importlib.metadata.version("setuptools").split(".")[0]) >= 77 and bool(
            importlib.metadata.version("pip")
        )
    except importlib.metadata.PackageNotFoundError:
        return False


pytestmark = pytest.mark.skipif(
    not can_build(), reason="building a wheel without a network takes pip and setuptools>=77"
)


def call(command: list, **options) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with `dist/`, wheel and sdist, and `site/`, where the wheel is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        shutil.copy(ROOT / name, source)
    for name in ("hf_vqgan", "tests", "scripts"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "dist").mkdir()
    backend = "from setuptools import build_meta as b; b.build_sdist('../dist'); b.build_wheel('../dist')"
    call([sys.executable, "-c", backend], cwd=source)
    (wheel,) = (folder / "dist").glob("*.whl")
    call([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile",
          "--disable-pip-version-check", "--target", folder / "site", wheel])  # fmt: skip
    return folder


def test_contents(built):
    (wheel,), (sdist,) = ((built / "dist").glob(kind) for kind in ("*.whl", "*.tar.gz"))
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "hf_vqgan").rglob("*")
               if path.is_file() and path.suffix != ".pyc"}  # fmt: skip
    names = set(zipfile.ZipFile(wheel).namelist())
    metadata = {name for name in names if ".dist-info/" in name}
    assert names - metadata == package
    assert {"hf_vqgan/recipes/quickstart.yaml", "hf_vqgan/py.typed"} <= package
    assert any(name.endswith("/licenses/LICENSE") for name in metadata)
    with tarfile.open(sdist) as archive:
        files = {member.name.partition("/")[2] for member in archive if member.isfile()}
    allowed = {*SOURCES, "PKG-INFO"}
    assert {name for name in files if not name.startswith("hf_vqgan.egg-info/")} == package | allowed


def test_use_outside_the_repository(built, tmp_path, image_folder, random_trunk):
    """From a folder of images to a trained model, loaded and measured, with the command alone."""
    site = built / "site"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "home")}
    options = {"cwd": tmp_path, "env": environment}
    hf_vqgan = site / "bin" / "hf-vqgan"

    assert re.search(r"^quickstart +A real VQ-GAN", call([hf_vqgan, "recipes"], **options), flags=re.MULTILINE)
    flags = TINY | {
        "config": "small_dataset_f8",
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "output_dir": "run",
        "dataset_name": image_folder,
        "resolution": 32,
        "resize": 40,
        "train_batch_size": 2,
        "max_train_steps": 10,
        "quantize_start": 2,
        "disc_start": 4,
        "disc_channels": 8,
        "disc_layers": 1,
        "mixed_precision": "no",
        "perceptual_net": "alex",
        "perceptual_weights_path": random_trunk / "alex.safetensors",
        "latent_statistics_images": 8,
        "cpu_threads": 1,
        "dataloader_num_workers": 0,
    }  # fmt: skip
    train = [hf_vqgan, "train"]
    for name, value in flags.items():
        train += [f"--{name}", *(value if isinstance(value, (list, tuple)) else [value])]
    assert call([*train, "--dry_run"], **options).splitlines()[-1].startswith("OK: ")
    assert not (tmp_path / "run").exists()
    call(train, **options)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["steps"] == 10

    load = "import hf_vqgan, json; model = hf_vqgan.VQGANModel.from_pretrained('run'); print(hf_vqgan.__file__)"
    assert call([sys.executable, "-c", load], **options).strip() == str(site / "hf_vqgan" / "__init__.py")
    call([hf_vqgan, "evaluate", "run", image_folder, "--max_samples", "2", "--resolution", "32", "--inception", "false",
          "--alex_weights_path", random_trunk / "alex.safetensors", "--cpu_threads", "1",
          "--vgg_weights_path", random_trunk / "vgg.safetensors"], **options)  # fmt: skip
    assert list(tmp_path.rglob("evaluation.json"))
