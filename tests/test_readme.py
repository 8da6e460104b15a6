"""README.md: its Python blocks run as a reader would type them; its file tree is there, and in reading order."""

import ast
import re
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
        name = line.split()[0]
        if not line.startswith(" "):
            folder = ROOT / name if name.endswith("/") else ROOT
            assert (ROOT / name).exists(), name
        else:
            assert (folder / name).exists(), f"{folder}/{name}"
    for link in re.findall(r"\]\(((?:docs|scripts|hf_vqgan)/[^)#]*)", README):
        assert (ROOT / link).exists(), link


def imported_modules(module: str) -> set[str]:
    """The package's modules that one of them imports, anywhere in its code."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / "hf_vqgan" / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {node.module} if node.module else {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
            assert not any(name.split(".")[0] == "hf_vqgan" for name in names), f"{module}: import relatively"
    return found


def test_a_module_imports_only_modules_above_it():
    """The tree lists every module once, in an order in which each can be read without looking ahead."""
    order = re.findall(r"^  (\w+)\.py ", TREE, flags=re.MULTILINE)
    assert sorted(order) == sorted(file.stem for file in (ROOT / "hf_vqgan").glob("*.py") if file.stem != "__init__")
    for place, module in enumerate(order):
        assert imported_modules(module) <= set(order[:place]), f"{module} imports modules below it"
