"""Shared fixtures: a model small enough for thousands of forward passes, and images of every awkward kind."""

import io
import os
import tarfile

os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
if "PYTEST_XDIST_WORKER" in os.environ:  # tests run side by side: one core each, and each of their processes
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import lpips
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import save_file
from transformers import ViTConfig, ViTModel

from hf_vqgan import VQGANConfig, VQGANLatentDiffusionPipeline, VQGANModel
from hf_vqgan.losses.image_losses import LPIPS
from hf_vqgan.losses.lpips_weights import NETWORKS

TINY = dict(
    block_out_channels=(8, 16),
    layers_per_block=1,
    norm_num_groups=4,
    latent_channels=8,
    vq_embed_dim=4,
    num_vq_embeddings=16,
    sample_size=16,
)

# What some quantizers need on top of TINY (whose vq_embed_dim is 4).
SPECIAL = {
    "fsq": {"fsq_levels": (3, 4, 2, 2)},
    "lfq": {"num_vq_embeddings": 2**4},
    "bsq": {"num_vq_embeddings": 2**4},
    "residual": {"num_codebooks": 3},
    "grouped": {"num_codebooks": 2},
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps a process's first choice of precision, and refuses another one."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def tiny_config() -> VQGANConfig:
    return VQGANConfig(**TINY)


@pytest.fixture
def tiny_model(tiny_config) -> VQGANModel:
    model = VQGANModel(tiny_config).eval()
    # Spread the codes: at U(±1/K) every latent of an untrained model has the same nearest code.
    torch.nn.init.normal_(model.quantize.embedding.weight, std=0.5)
    return model


@pytest.fixture(scope="session")
def trained_model() -> VQGANModel:
    """A tiny model that has seen enough smooth images to reconstruct them, in evaluation mode. Not to be changed."""
    torch.manual_seed(0)
    model = VQGANModel(VQGANConfig(**TINY | {"num_vq_embeddings": 64, "scaling_factor": 0.8, "shift_factor": 0.1}))
    images = torch.stack([smooth_pixels(seed, 32) for seed in range(32)])
    with torch.no_grad():
        latents = model.encode(images).latents.permute(0, 2, 3, 1).flatten(0, 2)
    model.quantize.initialize_codebook(latents, torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(80):
        batch = images[torch.arange(8 * step, 8 * step + 8) % len(images)]
        output = model(batch)
        loss = (output.sample - batch).abs().mean() + sum(output.losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tiny_pipeline(trained_model) -> VQGANLatentDiffusionPipeline:
    """An untrained pipeline of three classes for 16-pixel images. Not to be changed."""
    from test_pipelines import tiny_unet  # which imports this file

    torch.manual_seed(0)
    names = {0: "cat", 1: "dog", 2: "bird"}
    return VQGANLatentDiffusionPipeline(trained_model, tiny_unet(3), FlowMatchEulerDiscreteScheduler(), names)


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.rand(2, 3, 16, 24) * 2 - 1


def photo(seed: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    """A smooth random colour image."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (5, 4, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC)


def image_bytes(image: Image.Image, format: str = "PNG") -> bytes:
    """The image as a file."""
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def write_tar(file, images: list[bytes]) -> None:
    """A webdataset tar: NNN.jpg, each with a label NNN.cls."""
    with tarfile.open(file, "w") as tar:
        for number, image in enumerate(images):
            for name, content in ((f"{number:03d}.jpg", image), (f"{number:03d}.cls", b"1")):
                information = tarfile.TarInfo(name)
                information.size = len(content)
                tar.addfile(information, io.BytesIO(content))


def smooth_pixels(seed: int, height: int, width: int | None = None) -> torch.Tensor:
    """A smooth random image `(3, height, width)` in [-1, 1]."""
    pixels = np.array(photo(seed, (width or height, height)), dtype=np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1


@pytest.fixture
def image_folder(tmp_path):
    """An imagefolder with 12 training and 2 validation images."""
    for split, count in (("train", 12), ("validation", 2)):
        folder = tmp_path / "images" / split
        folder.mkdir(parents=True)
        for number in range(count):
            photo(number + 100 * (split == "validation")).save(folder / f"{number:02d}.png")
    return tmp_path / "images"


@pytest.fixture(scope="session")
def broken_folder(tmp_path_factory):
    """1,000 training images, 100 of them unreadable: `images/`, an imagefolder, and `tars/`, the same in four tars."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "images" / "validation").mkdir(parents=True)
    (folder / "images" / "train").mkdir()
    (folder / "tars").mkdir()
    photo(0, (10, 8)).save(folder / "images" / "validation" / "0.png")
    whole = image_bytes(photo(1, (10, 8)), "JPEG")
    text, zero = b"Gone: see the other server.", b""
    files = [[whole[:-40], zero, text, bytes(100)][(n + n // 20) % 4] if n % 20 < 2 else whole for n in range(1000)]
    files[510] = image_bytes(photo(2, (10, 8)), "PNG")  # a wrong extension hurts nobody
    for number, content in enumerate(files):
        (folder / "images" / "train" / f"{number:03d}.jpg").write_bytes(content)
    for shard in range(4):
        write_tar(folder / "tars" / f"train-{shard}.tar", files[250 * shard : 250 * (shard + 1)])
    write_tar(folder / "tars" / "validation-0.tar", [whole])
    return folder


@pytest.fixture(scope="session")
def backbone(tmp_path_factory) -> str:
    """The folder of a vision transformer small enough to train against, with random weights."""
    folder = tmp_path_factory.mktemp("backbone")
    config = ViTConfig(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=32,
                       patch_size=8)  # fmt: skip
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def random_trunk(tmp_path_factory):
    """Files with random LPIPS trunks, so that these tests need no network."""
    folder = tmp_path_factory.mktemp("lpips")
    for net, network in NETWORKS.items():
        generator = torch.Generator().manual_seed(0)
        shapes = network.build().state_dict()
        weights = {
            f"features.{name.split('.', 1)[1]}": torch.randn(tensor.shape, generator=generator)
            * (0.1 if tensor.ndim == 1 else (2 / tensor[0].numel()) ** 0.5)
            for name, tensor in shapes.items()
        }
        save_file(weights, folder / f"{net}.safetensors")
    return folder


def package_lpips(ours: LPIPS) -> lpips.LPIPS:
    """The `lpips` package's own network, with the trunk of ours."""
    theirs = lpips.LPIPS(net=ours.net, pnet_rand=True, verbose=False)
    named = theirs.state_dict()
    for key, tensor in ours.slices.state_dict().items():
        number, name = key.split(".", 1)
        named[f"net.slice{int(number) + 1}.{name}"].copy_(tensor)
    return theirs
