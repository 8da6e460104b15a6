"""Every Python block of README.md runs, in order, in one session, as a reader would type them."""

import re
from pathlib import Path

import pytest
from conftest import TINY, photo

from hf_vqgan import VQGANConfig, VQGANImageProcessor, VQGANModel

README = (Path(__file__).parent.parent / "README.md").read_text()
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
    root = Path(__file__).parent.parent
    tree = re.search(r"```\n(hf_vqgan/.*?)```", README, flags=re.DOTALL).group(1)
    folder = root
    for line in tree.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = root / name if name.endswith("/") else root
            assert (root / name).exists(), name
        else:
            assert (folder / name).exists(), f"{folder}/{name}"
    for link in re.findall(r"\]\(((?:docs|scripts|hf_vqgan)/[^)#]*)", README):
        assert (root / link).exists(), link
