"""Push, pull and stream against a Hub on loopback, clients in fresh processes as users have them."""

import json
from pathlib import Path

import pytest
from conftest import TINY, image_bytes, photo, write_tar
from hub_server import TOKEN, Hub

from hf_vqgan import VQGANConfig
from hf_vqgan.hub import push_run_to_hub
from hf_vqgan.training import VQGANTrainingConfig, train

ROOT = Path(__file__).parent.parent
LOAD = """
import torch
x = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
def show(model):
    with torch.no_grad():
        output = model(x)
    print(type(model).__name__, float(output.sample.double().sum()))
"""


@pytest.fixture(scope="module")
def hub():
    server = Hub()
    yield server
    server.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory, random_trunk):
    """A small trained run."""
    folder = tmp_path_factory.mktemp("data")
    for number in range(6):
        photo(number).save(folder / f"{number}.png")
    config = VQGANTrainingConfig(
        dataset_name=str(folder),
        output_dir=str(tmp_path_factory.mktemp("runs") / "emoji-tokenizer"),
        resolution=32,
        perceptual_net="alex",
        perceptual_weights_path=str(random_trunk / "alex.safetensors"),
        adversarial_weight=0.0,
        train_batch_size=2,
        max_train_steps=2,
        max_validation_samples=1,
        cpu_threads=1,
    )
    model = TINY | {"block_out_channels": (32, 32), "norm_num_groups": 32, "quantizer": "vq_ema"}
    train(config, VQGANConfig(**model))
    return Path(config.output_dir)


def push(hub, run, home, repo_id, **arguments):
    call = f"push_run_to_hub({str(run)!r}, {repo_id!r}, **{arguments})"
    return hub.run(f"from hf_vqgan.hub import push_run_to_hub; {call}", home)


def test_pushed_model_loads_everywhere(hub, run, tmp_path):
    push(hub, run, tmp_path / "writer", "user/tokenizer", license="apache-2.0")
    files = hub.files("user/tokenizer")
    assert {"model.safetensors", "config.json", "preprocessor_config.json", "README.md", "metrics.json",
            "reconstructions.png", "modeling_vqgan.py", "quantizers.py",
            "diffusers/diffusion_pytorch_model.safetensors"} <= files.keys()  # fmt: skip
    card = files["README.md"].decode()
    psnr = json.loads(files["metrics.json"])["psnr"]
    assert f"| PSNR (dB) | {psnr:.2f} |" in card and "license: apache-2.0" in card
    assert 'VQGANModel.from_pretrained("user/tokenizer")' in card and 'subfolder="diffusers"' in card

    here = hub.run(
        LOAD
        + "from hf_vqgan import VQGANModel; show(VQGANModel.from_pretrained('user/tokenizer'))\n"
        + "import transformers; show(transformers.AutoModel.from_pretrained('user/tokenizer'))\n"
        + "print(type(transformers.AutoImageProcessor.from_pretrained('user/tokenizer')).__name__)",
        tmp_path / "reader",
    ).splitlines()
    # Without the package: an import of it would fail.
    absent = "import sys; sys.modules['hf_vqgan'] = None\n" + LOAD
    elsewhere = hub.run(
        absent
        + "import transformers; m = transformers.AutoModel.from_pretrained('user/tokenizer', trust_remote_code=True)\n"
        + "show(m)\n"
        + "p = transformers.AutoImageProcessor.from_pretrained('user/tokenizer', trust_remote_code=True)\n"
        + "print(type(p).__name__)\n"
        + "import diffusers; show(diffusers.VQModel.from_pretrained('user/tokenizer', subfolder='diffusers').eval())\n"
        + "show(diffusers.AutoModel.from_pretrained('user/tokenizer', subfolder='diffusers').eval())",
        tmp_path / "stranger",
    ).splitlines()
    expected = float(here[0].split()[1])
    assert [line.split()[0] for line in here] == ["VQGANModel", "VQGANModel", "VQGANImageProcessor"]
    assert [line.split()[0] for line in elsewhere] == ["VQGANModel", "VQGANImageProcessor", "VQModel", "VQModel"]
    for line in (here[1], elsewhere[0], elsewhere[2], elsewhere[3]):
        assert float(line.split()[1]) == pytest.approx(expected, abs=1e-3)


def test_revisions_and_python_push(hub, run, tmp_path):
    code = """
from hf_vqgan import VQGANModel
from hf_vqgan.hub import push_run_to_hub
import torch
model = VQGANModel.from_pretrained(RUN)
first = model.push_to_hub("user/revisions").oid
with torch.no_grad():
    model.decoder.conv_out.bias.add_(1)
model.push_to_hub("user/revisions")
push_run_to_hub(RUN, "user/revisions", variant="bf16")
load = VQGANModel.from_pretrained
shift = load("user/revisions").decoder.conv_out.bias - load("user/revisions", revision=first).decoder.conv_out.bias
print([round(float(value), 4) for value in shift])
print(load("user/revisions", variant="bf16", dtype=torch.bfloat16).dtype)
"""
    printed = hub.run(f"RUN = {str(run)!r}\n" + code, tmp_path / "home").splitlines()
    assert printed == ["[1.0, 1.0, 1.0]", "torch.bfloat16"]


def test_private_repository_without_a_token(hub, run, tmp_path):
    push(hub, run, tmp_path / "writer", "user/secret", private=True)
    load = "from hf_vqgan import VQGANModel; print(type(VQGANModel.from_pretrained('user/secret')).__name__)"
    assert hub.run(load, tmp_path / "owner").strip() == "VQGANModel"
    with pytest.raises(AssertionError, match="user/secret is not a local folder|private repository"):
        hub.run(load, tmp_path / "stranger", token=None)


def test_interrupted_upload_leaves_the_repository_as_it_was(hub, run, tmp_path):
    push(hub, run, tmp_path / "writer", "user/interrupted")
    before = dict(hub.files("user/interrupted"))
    changed = tmp_path / "run"
    changed.mkdir()
    for file in run.iterdir():
        if file.is_file():
            (changed / file.name).write_bytes(file.read_bytes())
    (changed / "curves.png").write_bytes((run / "codebook.png").read_bytes() + b"new")
    hub.fail_uploads = 10**6
    with pytest.raises(AssertionError, match="Error while uploading"):
        push(hub, changed, tmp_path / "writer", "user/interrupted")
    hub.fail_uploads = 0
    assert hub.files("user/interrupted") == before
    push(hub, changed, tmp_path / "writer", "user/interrupted")
    assert hub.files("user/interrupted")["curves.png"].endswith(b"new")


def test_script_pushes_and_reads_a_hub_dataset(hub, run, random_trunk, tmp_path):
    make = """
import datasets, PIL.Image, numpy as np
images = [PIL.Image.fromarray(np.full((40, 40, 3), 20 * i, dtype=np.uint8)) for i in range(8)]
features = datasets.Features({"image": datasets.Image()})
datasets.Dataset.from_dict({"image": images}, features=features).push_to_hub("user/squares")
print(sum(1 for _ in datasets.load_dataset("user/squares", split="train", streaming=True)))
"""
    assert hub.run(make, tmp_path / "home").strip().endswith("8")
    arguments = TINY | {
        "config": "none",
        "dataset_name": "user/squares",
        "output_dir": tmp_path / "squares",
        "resolution": 32,
        "max_train_steps": 1,
        "train_batch_size": 2,
        "adversarial_weight": 0,
        "perceptual_net": "alex",
        "perceptual_weights_path": random_trunk / "alex.safetensors",
        "push_to_hub": True,
        "hub_token": TOKEN,
    }
    argv = ["train_vqgan.py"]
    for name, value in arguments.items():
        argv += [f"--{name}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    script = str(ROOT / "scripts" / "train_vqgan.py")
    code = f"import sys, runpy; sys.argv = {argv}; runpy.run_path({script!r}, run_name='__main__')"
    hub.run(code, tmp_path / "home", token=None)
    files = hub.files("user/squares")
    card = files["README.md"].decode()
    assert "datasets/user/squares" in card and "- user/squares" in card
    assert not any(TOKEN.encode() in content for content in files.values())


def test_datasets_of_the_hub_are_streamed(hub, tmp_path):
    """Parquet, image files and a webdataset tar, each in a repository: nothing of them lands on the disk."""
    for number in range(8):
        (tmp_path / "files" / "train").mkdir(parents=True, exist_ok=True)
        photo(number).save(tmp_path / "files" / "train" / f"{number}.png")
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "0.tar", [image_bytes(photo(number)) for number in range(8)])
    make = f"""
import datasets, huggingface_hub
datasets.load_dataset({str(tmp_path / "files")!r}).push_to_hub("user/parquet", num_shards={{"train": 2}})
for kind in ("files", "tars"):
    huggingface_hub.create_repo(f"user/{{kind}}", repo_type="dataset")
    huggingface_hub.upload_folder(repo_id=f"user/{{kind}}", folder_path=f"{tmp_path}/{{kind}}", repo_type="dataset")
"""
    hub.run(make, tmp_path / "writer")
    read = """
from hf_vqgan.data import ImageTransform, load_batches
from hf_vqgan.streaming_data import StreamedImages, load_image_stream
for kind in ("parquet", "files", "tars"):
    shards, validation = load_image_stream(f"user/{kind}", validation_size=2)
    stream = StreamedImages([shards], ImageTransform(16, center_crop=True, random_flip=False))
    batch = next(load_batches(stream, 6, num_workers=1))
    images = sorted(round(image.double().sum().item(), 3) for image in batch["pixel_values"])
    print(len(shards), len(validation), int(batch["unreadable"].sum()), images)
"""
    parquet, files, tars = hub.run(read, tmp_path / "reader").splitlines()
    assert parquet.startswith("2 2 0 [") and files.startswith("1 2 0 [") and tars.startswith("1 2 0 [")
    assert parquet.split("[")[1] == files.split("[")[1] == tars.split("[")[1]
    assert not list((tmp_path / "reader").rglob("*.arrow")) and not list((tmp_path / "reader").rglob("*.png"))


def test_unfinished_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a finished run: config.json, metrics.json"):
        push_run_to_hub(tmp_path, "user/name")
