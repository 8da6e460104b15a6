"""
Push, pull and stream against a Hub on loopback, clients in fresh processes as users have them.

The same tests run against the real Hub, in repositories of their own that are deleted afterwards:

    HF_VQGAN_TEST_HUB_ENDPOINT=https://huggingface.co HF_VQGAN_TEST_HUB_TOKEN=hf_... python -m pytest tests/test_hub.py

The token has to be allowed to create and delete repositories. Tests that make the server fail are skipped then.
"""

import json
import os
import shutil
import tempfile
import uuid
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import yaml
from conftest import TINY, image_bytes, photo, write_tar
from hub_server import Hub, LoopbackHub

from hf_vqgan import VQGANConfig, VQGANImageProcessor, VQGANModel
from hf_vqgan.hub.push import push_pipeline_to_hub, push_run_to_hub
from hf_vqgan.training.configuration import VQGANTrainingConfig
from hf_vqgan.training.tokenizer import train

ROOT = Path(__file__).parent.parent
ENDPOINT, TOKEN = (os.environ.get(f"HF_VQGAN_TEST_HUB_{name}") for name in ("ENDPOINT", "TOKEN"))
on_loopback = pytest.mark.skipif(ENDPOINT is not None, reason="only the loopback Hub can be made to fail")


@pytest.fixture(scope="module")
def hub():
    hub = Hub(ENDPOINT, TOKEN, prefix=f"hf-vqgan-test-{uuid.uuid4().hex[:8]}-") if ENDPOINT else LoopbackHub()
    yield hub
    hub.close()


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


PUBLISH = """
import datasets, numpy, PIL.Image, torch
from hf_vqgan import VQGANModel
from hf_vqgan.hub.push import push_run_to_hub

push_run_to_hub(RUN, names["tokenizer"], license="apache-2.0")
push_run_to_hub(RUN, names["tokenizer"], variant="bf16", max_shard_size="200KB")
push_run_to_hub(RUN, names["sharded"])
push_run_to_hub(RUN, names["sharded"], max_shard_size="200KB")  # takes the place of the whole file
push_run_to_hub(RUN, names["secret"], private=True)
model = VQGANModel.from_pretrained(RUN)
print(model.push_to_hub(names["revisions"]).oid)
with torch.no_grad():
    model.decoder.conv_out.bias.add_(1)
model.push_to_hub(names["revisions"])
rows = {
    "image": [PIL.Image.fromarray(numpy.full((40, 40, 3), 20 * i, dtype=numpy.uint8)) for i in range(8)],
    "label": [0, 1] * 4,
}
features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["even", "odd"]))
datasets.Dataset.from_dict(rows, features=features).push_to_hub(names["squares"])
"""


@pytest.fixture(scope="module")
def published(hub, run, tmp_path_factory):
    """The run in repositories of several kinds, and a dataset; by name. `first_revision` is a commit."""
    names = {name: hub.name(name) for name in ("tokenizer", "sharded", "secret", "revisions", "squares")}
    printed = hub.run(f"RUN, names = {str(run)!r}, {names!r}" + PUBLISH, tmp_path_factory.mktemp("writer"))
    return names | {"first_revision": printed.splitlines()[0]}


LOAD = """
import diffusers, torch, transformers
from PIL import Image

found = {}
x = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)

@torch.no_grad()
def show(name, load, dtype, **options):
    cases = {
        "whole": (names["tokenizer"], {}),
        "shards": (names["sharded"], {}),
        "device_map": (names["sharded"], {"device_map": {"": "cpu"}}),
        "variant": (names["tokenizer"], {"variant": "bf16", dtype: torch.bfloat16}),
        "float16": (names["tokenizer"], {dtype: torch.float16}),
    }
    if dtype == "dtype":  # diffusers' VQModel cannot
        cases["device_map_auto"] = names["sharded"], {"device_map": "auto"}
    for case, (repository, more) in cases.items():
        model = load(repository, **more, **options).eval()
        latents = model.encode(x.to(model.dtype)).latents
        found[name, case] = {
            "type": type(model).__name__,
            "dtype": model.dtype,
            "reconstruction": model.decode(latents).sample,
            "unquantized": model.decoder(model.post_quant_conv(latents)).float(),
        }

def fail(name, load, **options):
    try:
        load(names["secret"], **options)
    except OSError as error:
        found[name, "secret"] = str(error)

def show_processor(name, **options):
    processor = transformers.AutoImageProcessor.from_pretrained(names["tokenizer"], **options)
    pixels = processor(Image.new("RGB", (50, 40), "teal"), return_tensors="pt")["pixel_values"]
    found[name, "processor"] = {"type": type(processor).__name__, "pixels": pixels}
"""
WITH_PACKAGE = (
    LOAD
    + """
from hf_vqgan import VQGANModel

show("VQGANModel", VQGANModel.from_pretrained, "dtype")
show("AutoModel", transformers.AutoModel.from_pretrained, "dtype")
show_processor("AutoImageProcessor")
fail("VQGANModel", VQGANModel.from_pretrained, token=False)
found["owner"] = type(VQGANModel.from_pretrained(names["secret"])).__name__
new, old = (VQGANModel.from_pretrained(names["revisions"], revision=name) for name in ("main", names["first_revision"]))
found["shift"] = (new.decoder.conv_out.bias - old.decoder.conv_out.bias).detach()
found["streamed"] = len(list(__import__("datasets").load_dataset(names["squares"], split="train", streaming=True)))
torch.save(found, FILE)
"""
)
WITHOUT_PACKAGE = (
    "import sys; sys.modules['hf_vqgan'] = None  # an import of it fails\n"
    + LOAD
    + """
show("remote code", transformers.AutoModel.from_pretrained, "dtype", trust_remote_code=True)
show("VQModel", diffusers.VQModel.from_pretrained, "torch_dtype", subfolder="diffusers")
show("diffusers.AutoModel", diffusers.AutoModel.from_pretrained, "torch_dtype", subfolder="diffusers")
show_processor("remote code", trust_remote_code=True)
fail("AutoModel", transformers.AutoModel.from_pretrained)
fail("VQModel", diffusers.VQModel.from_pretrained, subfolder="diffusers")
torch.save(found, FILE)
"""
)


@pytest.fixture(scope="module")
def loaded(hub, published, tmp_path_factory):
    """What fresh processes loaded: an owner's with the package, and a stranger's without package and token."""
    home, found = tmp_path_factory.mktemp("readers"), {}
    for number, (code, token) in enumerate(((WITH_PACKAGE, ""), (WITHOUT_PACKAGE, None))):
        file = home / f"{number}.pt"
        hub.run(f"FILE, names = {str(file)!r}, {published!r}\n" + code, home / str(number), token)
        found |= torch.load(file, weights_only=False)
    return found


LOADERS = dict.fromkeys(("VQGANModel", "AutoModel", "remote code"), "VQGANModel")
LOADERS |= dict.fromkeys(("VQModel", "diffusers.AutoModel"), "VQModel")


@pytest.mark.parametrize("case", ["whole", "shards", "device_map", "device_map_auto", "variant", "float16"])
@pytest.mark.parametrize("loader", LOADERS)
def test_pushed_model_loads_everywhere(loaded, run, loader, case):
    if case == "device_map_auto" and LOADERS[loader] == "VQModel":
        return
    found, dtype = loaded[loader, case], {"variant": torch.bfloat16, "float16": torch.float16}.get(case, torch.float32)
    assert found["type"] == LOADERS[loader] and found["dtype"] == dtype
    expected = loaded["VQGANModel", "whole"]
    if dtype == torch.float32:
        torch.testing.assert_close(found["unquantized"], expected["unquantized"], atol=1e-4, rtol=0)
        torch.testing.assert_close(found["reconstruction"], expected["reconstruction"], atol=1e-4, rtol=0)
    else:  # a rounded model, the same wherever loaded; codes that change with rounding are left out
        same = loaded["VQGANModel", case]["unquantized"]
        torch.testing.assert_close(found["unquantized"], same, atol=1e-4, rtol=0)
        assert (same - expected["unquantized"]).abs().mean() < 0.05


def test_loaded_model_is_the_one_that_was_trained(loaded, run):
    model = VQGANModel.from_pretrained(run).eval()
    x = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    with torch.no_grad():
        sample = model(x).sample
    torch.testing.assert_close(loaded["VQGANModel", "whole"]["reconstruction"], sample, atol=1e-4, rtol=0)
    assert loaded["shift"].tolist() == pytest.approx([1, 1, 1], abs=1e-5)  # of two revisions
    assert loaded["streamed"] == 8
    processor = VQGANImageProcessor.from_pretrained(run)
    for loader in ("AutoImageProcessor", "remote code"):
        found = loaded[loader, "processor"]
        assert found["type"] == "VQGANImageProcessor" and found["pixels"].shape == (1, 3, 32, 32)
        assert processor.postprocess(found["pixels"])[0].getpixel((0, 0)) == (0, 128, 128)  # teal


def test_files_and_card(hub, published):
    files = hub.files(published["tokenizer"])
    assert {"model.safetensors", "config.json", "preprocessor_config.json", "README.md", "metrics.json",
            "reconstructions.png", "modeling_vqgan.py", "quantizers.py", "model.safetensors.index.bf16.json",
            "diffusers/diffusion_pytorch_model.safetensors"} <= files.keys()  # fmt: skip
    card = files["README.md"].decode()
    psnr = json.loads(files["metrics.json"])["psnr"]
    assert f"| PSNR (dB) | {psnr:.2f} |" in card and "license: apache-2.0" in card
    assert f'VQGANModel.from_pretrained("{published["tokenizer"]}")' in card and 'subfolder="diffusers"' in card
    sharded = hub.files(published["sharded"])
    assert "model.safetensors" not in sharded and "model.safetensors.index.json" in sharded
    assert "diffusers/diffusion_pytorch_model.safetensors" not in sharded


def test_private_repository_needs_a_token(loaded):
    assert loaded["owner"] == "VQGANModel"
    for loader in ("VQGANModel", "AutoModel", "VQModel"):
        assert "is not a local folder" in loaded[loader, "secret"] and "token" in loaded[loader, "secret"]


def script(hub, home, name, *arguments, token="", **flags) -> str:
    """A script of this repository in a fresh process; what it prints."""
    argv = [name, *map(str, arguments)]
    for flag, value in flags.items():
        argv += [f"--{flag}", *(map(str, value) if isinstance(value, (tuple, list)) else [str(value)])]
    path = str(ROOT / "scripts" / name)
    code = f"import sys, runpy; sys.argv = {argv}; runpy.run_path({path!r}, run_name='__main__')"
    return hub.run(code, home, token)


def test_training_script_pushes(hub, published, random_trunk, tmp_path):
    output = tmp_path / published["squares"].split("/")[1]  # which names the repository
    flags = TINY | {
        "config": "none",
        "dataset_name": published["squares"],
        "output_dir": output,
        "resolution": 32,
        "max_train_steps": 1,
        "train_batch_size": 2,
        "adversarial_weight": 0,
        "perceptual_net": "alex",
        "perceptual_weights_path": random_trunk / "alex.safetensors",
        "push_to_hub": True,
        "hub_token": hub.token,
    }
    script(hub, tmp_path / "home", "train_vqgan.py", token=None, **flags)
    files = hub.files(published["squares"])
    card = files["README.md"].decode()
    assert f"datasets/{published['squares']}" in card and f"- {published['squares']}" in card
    assert not any(hub.token.encode() in content for content in files.values())


USE = """
import datasets, diffusers, numpy, torch
import hf_vqgan

for rows in (datasets.load_dataset(LATENTS, split="train", streaming=streaming) for streaming in (True, False)):
    rows = list(rows)
    print(len(rows), sorted(rows[0]), numpy.shape(rows[0]["latents"]), numpy.shape(rows[0]["indices"]))
pipeline = diffusers.DiffusionPipeline.from_pretrained(PIPELINE)
generator = torch.manual_seed(0)
images = pipeline(class_labels="odd", num_inference_steps=2, generator=generator, output_type="np").images
numpy.save(FILE, images)
half = diffusers.DiffusionPipeline.from_pretrained(PIPELINE, variant="bf16", torch_dtype=torch.bfloat16)
print(half.denoiser.dtype, half.vqvae.dtype, half(class_labels=0, num_inference_steps=1, output_type="np").images.shape)
"""


def test_latents_and_pipeline_are_pushed_and_used(hub, published, tmp_path):
    """From a model and images on the Hub to latents on the Hub to a pipeline on the Hub to pictures."""
    latents, pipeline = hub.name("latents"), hub.name("pipeline")
    sharing = {"push_to_hub": True, "hub_token": hub.token, "cpu_threads": 1}
    script(
        hub, tmp_path / "home", "encode_dataset.py", published["tokenizer"], published["squares"], tmp_path / "latents",
        resolution=32, shard_size=3, hub_dataset_id=latents, hub_private_repo=True, token=None, **sharing,
    )  # fmt: skip
    output = tmp_path / "diffusion"
    script(
        hub, tmp_path / "home", "train_latent_diffusion.py", vqgan=published["tokenizer"], dataset_name=latents,
        class_column="label", output_dir=output, hub_model_id=pipeline, block_out_channels=(8, 16), layers_per_block=1,
        norm_num_groups=4, attention_head_dim=4, train_batch_size=4, max_train_steps=2, sample_inference_steps=1,
        sample_images=4, hub_license="mit", **sharing,
    )  # fmt: skip
    code = f"from hf_vqgan.hub.push import push_pipeline_to_hub\npush_pipeline_to_hub({str(output)!r}, {pipeline!r}, "
    code += "variant='bf16')\n"
    code += f"LATENTS, PIPELINE, FILE = {latents!r}, {pipeline!r}, {str(tmp_path / 'images.npy')!r}"
    printed = hub.run(code + USE, tmp_path / "reader").splitlines()
    assert printed == [
        *["8 ['indices', 'label', 'latents'] (4, 16, 16) (16, 16)"] * 2,
        "torch.bfloat16 torch.bfloat16 (1, 32, 32, 3)",
    ]
    here = diffusers.DiffusionPipeline.from_pretrained(output)
    generator = torch.manual_seed(0)
    expected = here(class_labels="odd", num_inference_steps=2, generator=generator, output_type="np").images
    np.testing.assert_allclose(np.load(tmp_path / "images.npy"), expected, atol=1e-4)
    files = hub.files(pipeline)
    assert files["samples.png"] == (output / "samples-2.png").read_bytes()
    card = files["README.md"].decode()
    assert f'from_pretrained("{pipeline}")' in card and "Classes: even, odd." in card and "license: mit" in card
    assert f"- {latents}" in card and f"base_model: {published['tokenizer']}" in card
    everything = [*files.values(), *hub.files(latents, "dataset").values()]
    assert not any(hub.token.encode() in content for content in everything)


SHARE_LOCAL = """
from hf_vqgan.hub.push import push_run_to_hub
from hf_vqgan.generation.encoded_dataset import EncodingConfig, encode_dataset
from hf_vqgan.generation.denoisers import LatentDiffusionConfig
from hf_vqgan.generation.diffusion import train_latent_diffusion

push_run_to_hub(RUN, names["local-tokenizer"], token=TOKEN)
sharing = {"push_to_hub": True, "hub_token": TOKEN, "cpu_threads": 1}
encode_dataset(RUN, IMAGES, LATENTS, EncodingConfig(resolution=32, hub_dataset_id=names["local-latents"], **sharing))
small = dict(block_out_channels=[8, 16], layers_per_block=1, norm_num_groups=4, attention_head_dim=4)
small |= dict(train_batch_size=2, max_train_steps=1, sample_images=1, sample_inference_steps=1)
places = dict(vqgan=RUN, dataset_name=LATENTS, output_dir=PIPELINE, hub_model_id=names["local-pipeline"])
train_latent_diffusion(LatentDiffusionConfig(**places, **small, **sharing))
"""


def test_pushed_files_name_no_place_on_this_machine(hub, run, tmp_path):
    """Models and data in local folders go by their last names; paths would tell who works where, and help nobody."""
    folder = tmp_path / "janedoe" / "tokenizer"
    shutil.copytree(run, folder)
    images = json.loads((folder / "metrics.json").read_text())
    settings = yaml.safe_load((folder / "training_config.yaml").read_text())
    settings["dataset_name"] = str(tmp_path / "janedoe" / "photos")
    (folder / "training_config.yaml").write_text(yaml.safe_dump(settings))
    images["measured_on"]["psnr, ssim, lpips, l1, validation_*"] = (
        f"images of {settings['dataset_name']} (older versions)"
    )
    (folder / "metrics.json").write_text(json.dumps(images))
    protocol = {"dataset": settings["dataset_name"], "dataset_config": None, "split": "test", "dataset_commit": None,
                "num_images": 2, "resolution": 32, "resize": 32, "crop": "centre"}  # fmt: skip
    evaluation = {"psnr": 9.0, "protocol": protocol, "models": [{"name": str(folder)}], "skipped": {}}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    (tmp_path / "janedoe" / "photos").mkdir()
    for number in range(3):
        photo(number).save(tmp_path / "janedoe" / "photos" / f"{number}.png")

    kinds = {"local-tokenizer": "model", "local-latents": "dataset", "local-pipeline": "model"}
    names = {name: hub.name(name) for name in kinds}
    places = {"RUN": folder, "IMAGES": tmp_path / "janedoe" / "photos", "LATENTS": tmp_path / "janedoe" / "latents",
              "PIPELINE": tmp_path / "janedoe" / "pipeline"}  # fmt: skip
    given = "".join(f"{name} = {str(path)!r}\n" for name, path in places.items())
    hub.run(f"{given}TOKEN, names = {hub.token!r}, {names!r}\n" + SHARE_LOCAL, tmp_path / "home", token=None)
    for name, kind in kinds.items():
        files = hub.files(names[name], kind)
        for secret in (str(tmp_path), "janedoe", hub.token, tempfile.gettempdir() + "/", f"{Path.home()}/"):
            found = [path for path, content in files.items() if secret.encode() in content]
            assert not found, f"{secret} is in {found} of {name}"
    files = hub.files(names["local-tokenizer"])
    assert (
        "Data: `photos`." in files["README.md"].decode() and "images of photos (older" in files["metrics.json"].decode()
    )
    assert json.loads(files["evaluation.json"])["models"] == [{"name": "tokenizer"}]
    assert yaml.safe_load(files["training_config.yaml"])["dataset_name"] == "photos"
    assert "VQ-GAN: `tokenizer`. Data: `latents`." in hub.files(names["local-pipeline"])["README.md"].decode()
    assert (
        str(tmp_path) in (folder / "training_config.yaml").read_text()
    )  # where it stays, since the run is resumed by it


@on_loopback
def test_interrupted_uploads_change_nothing_until_one_is_complete(hub, run, tmp_path):
    """A client killed in mid-file, a connection lost before the commit, and one lost in mid-file."""
    repository = hub.name("interrupted")
    (folder := tmp_path / "run").mkdir()
    for file in run.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / "curves.png").write_bytes(b"first")  # a file that the server, which keeps what it gets, has not got yet
    push = (
        "from hf_vqgan.hub.push import push_run_to_hub\n"
        f"push = lambda: push_run_to_hub({str(folder)!r}, {repository!r})\n"
    )
    hub.fault = "PUT", "stall"
    hub.stalled.clear()
    client = hub.start(push + "push()", tmp_path / "home")
    assert hub.stalled.wait(timeout=300)
    client.kill()
    client.communicate()
    assert hub.files(repository) == {}

    again = """
from huggingface_hub import HfApi
def count():
    return len(HfApi().list_repo_files(REPOSITORY))
try:
    push()
except Exception as error:
    print(type(error).__name__, count())
push()
print(count() > 10)
"""
    hub.fault = "commit", "drop"
    printed = hub.run(push + f"REPOSITORY = {repository!r}" + again, tmp_path / "home").splitlines()
    assert printed[-1] == "True" and printed[-2].endswith("Error 0"), printed
    assert hub.files(repository)["curves.png"] == b"first"

    (folder / "curves.png").write_bytes(b"second")
    hub.fault = "PUT", "drop"  # which huggingface_hub repairs by itself
    hub.run(push + "push()", tmp_path / "home")
    assert hub.fault is None
    assert hub.files(repository)["curves.png"] == b"second"


def test_real_hub_client(tmp_path):
    """What HF_VQGAN_TEST_HUB_ENDPOINT switches to, pointed at a second server: reads it back, and cleans up."""
    server = LoopbackHub()
    client = Hub(server.endpoint, server.token, prefix="unique-")
    name = client.name("thing")
    create = f"""
from huggingface_hub import HfApi
api = HfApi()
for kind in ("model", "dataset"):
    api.create_repo({name!r}, repo_type=kind)
    api.upload_file(path_or_fileobj=kind.encode(), path_in_repo="folder/file", repo_id={name!r}, repo_type=kind)
"""
    client.run(create, tmp_path)
    assert name == "user/unique-thing"
    assert [client.files(name, kind)["folder/file"] for kind in ("model", "dataset")] == [b"model", b"dataset"]
    client.close()
    assert server.repositories == {}
    server.close()


@on_loopback
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
from hf_vqgan.data.datasets import ImageTransform, load_batches
from hf_vqgan.data.streams import StreamedImages, load_image_stream
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
    with pytest.raises(FileNotFoundError, match="is not a finished run: model_index.json, metrics.json"):
        push_pipeline_to_hub(tmp_path, "user/name")
    with pytest.raises(ValueError, match="cannot load a variant in shards"):
        push_pipeline_to_hub(tmp_path, "user/name", variant="bf16", max_shard_size="1GB")
