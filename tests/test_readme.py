"""README.md: its Python blocks run as a reader would type them; its file tree is the one that is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY, photo

from hf_vqgan import VQGANConfig, VQGANImageProcessor, VQGANModel

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TREE = re.search(r"```\n(hf_vqgan/.*?)```", README, flags=re.DOTALL).group(1)
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def quickstart_run(tmp_path, monkeypatch):
    """The folder that the quickstart leaves behind, with an untrained model, and a photo to try it on."""
    monkeypatch.chdir(tmp_path)
    config = VQGANConfig(**TINY | {"block_out_channels": (32, 32, 32), "num_vq_embeddings": 1024, "norm_num_groups": 8})
    VQGANModel(config).save_pretrained("runs/quickstart")
    VQGANImageProcessor(size_divisor=4).save_pretrained("runs/quickstart")
    photo(0, (300, 200)).save("photo.jpg")


def test_python_blocks_run(quickstart_run):
    assert BLOCKS
    namespace = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), namespace)


def test_named_files_exist():
    """Paths in the README's file tree and links."""
    folder = ROOT
    for line in TREE.splitlines():
        names = line.strip().partition("   ")[0].split(", ")
        if not line.startswith(" "):
            folder = ROOT / names[0]
            assert folder.is_dir(), folder
        else:
            assert names and all((folder / name).exists() for name in names), line
    for link in re.findall(r"\]\(((?:docs|scripts|hf_vqgan)/[^)#]*)", README):
        assert (ROOT / link).exists(), link


def test_the_tree_names_everything():
    """What is at the package's root, and every folder; nothing else stands there."""
    package = ROOT / "hf_vqgan"
    modules = {file.name for file in package.glob("*.py") if file.stem != "__init__"}
    folders = {folder.name + "/" for folder in package.iterdir() if folder.is_dir() and folder.name != "__pycache__"}
    assert set(re.findall(r"\b(\w+\.py)", TREE.split("scripts/")[0])) == modules
    assert set(re.findall(r"^  (\w+/)", TREE.split("scripts/")[0], flags=re.MULTILINE)) == folders


def test_folders_import_one_way():
    """In the order that pyproject.toml declares: what travels with a pushed model imports nothing from folders."""
    contract = (ROOT / "pyproject.toml").read_text().partition("[[tool.importlinter.contracts]]")[2].partition("]\n")[0]
    parts = re.findall(r"\bhf_vqgan\.\w+", contract)
    package = ROOT / "hf_vqgan"
    present = [f"hf_vqgan.{file.stem}" for file in package.glob("*.py") if not file.stem.startswith("__")]
    assert sorted(parts) == sorted(present + [f"hf_vqgan.{file.parent.name}" for file in package.glob("*/__init__.py")])
    done = subprocess.run([Path(sys.executable).parent / "lint-imports"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
