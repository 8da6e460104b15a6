"""Images from models of tokens: every quantizer, classes, outputs, and pipelines that are saved, loaded and pushed."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import datasets
import diffusers
import numpy as np
import pytest
import torch
import yaml
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module
from conftest import SPECIAL, TINY
from hub_server import LoopbackHub
from PIL import Image
from test_token_models import KINDS, SMALL, both

from hf_vqgan import QUANTIZERS, VQGANConfig, VQGANModel, VQGANTokenPipeline
from hf_vqgan.generation.token_models import TokenTrainingConfig, build_token_model
from hf_vqgan.generation.tokens import draw_samples
from hf_vqgan.hub.push import push_pipeline_to_hub

NAMES = {0: "cat", 1: "dog", 2: "eel"}


def pipeline_of(vqgan: VQGANModel, kind: str, num_classes: int = 3) -> VQGANTokenPipeline:
    """Images of 16 pixels, from 8 x 8 tokens."""
    torch.manual_seed(0)
    quantizer = vqgan.quantize
    config, model = KINDS[kind]
    fields = dict(num_vq_embeddings=quantizer.num_codes, num_codebooks=quantizer.num_codebooks, sample_size=8)
    token_model = model(config(**SMALL, **fields, num_classes=num_classes)).eval()
    pipeline = VQGANTokenPipeline(copy.deepcopy(vqgan), token_model, NAMES if num_classes else None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(params=KINDS)
def pipeline(request, trained_model) -> VQGANTokenPipeline:
    return pipeline_of(trained_model, request.param)


def seeded(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


@both
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_tokens_of_every_quantizer(kind, quantizer):
    vqgan = VQGANModel(VQGANConfig(**TINY | {"quantizer": quantizer} | SPECIAL.get(quantizer, {}))).eval()
    pipeline = pipeline_of(vqgan, kind)
    indices = pipeline(class_labels=[0, 2], generator=seeded(), output_type="indices").images
    assert indices.shape == (2, *pipeline.token_model.config.grid_shape)
    assert indices.min() >= 0 and indices.max() < vqgan.quantize.num_codes and len(indices.unique()) > 4
    images = pipeline(class_labels=[0, 2], generator=seeded(), output_type="pt").images
    torch.testing.assert_close(images, (vqgan.decode_indices(indices).sample / 2 + 0.5).clamp(0, 1))


def test_outputs_of_each_type_agree(pipeline):
    def images(kind, **options):
        return pipeline(class_labels="dog", top_k=9, generator=seeded(), output_type=kind, **options)

    indices, pt, array, (pil,) = (images(kind).images for kind in ("indices", "pt", "np", "pil"))
    assert pt.shape == (1, 3, 16, 16) and 0 <= pt.min() < pt.max() <= 1
    torch.testing.assert_close(pt, (pipeline.vqvae.decode_indices(indices).sample / 2 + 0.5).clamp(0, 1))
    np.testing.assert_array_equal(array[0], pt[0].permute(1, 2, 0).numpy())
    np.testing.assert_array_equal(np.array(pil), (array[0] * 255).round().astype("uint8"))
    (tensors,) = images("pt", return_dict=False)
    assert torch.equal(tensors, pt)


def test_images_per_class_and_none(pipeline):
    def indices(**options):
        return pipeline(output_type="indices", **options).images

    pairs = indices(class_labels=["eel", 0], num_images=2, generator=seeded())
    assert torch.equal(pairs, indices(class_labels=[2, 2, 0, 0], generator=seeded()))
    assert indices(num_images=3).shape == (3, 8, 8)
    cold = indices(class_labels=[1, 1], temperature=0.0, generator=seeded())
    if "Autoregressive" in type(pipeline.token_model).__name__:
        assert torch.equal(cold[0], cold[1])


def test_steps_are_shown_and_belong_to_masked_models(trained_model, capsys):
    masked, autoregressive = (pipeline_of(trained_model, kind) for kind in ("masked", "autoregressive"))
    for pipeline, options, shown in ((masked, {"num_inference_steps": 5}, "5/5"), (masked, {}, "12/12"),
                                     (autoregressive, {"num_inference_steps": 64}, "64/64")):  # fmt: skip
        pipeline.set_progress_bar_config(disable=False)
        pipeline(**options)
        assert shown in capsys.readouterr().err
    with pytest.raises(ValueError, match="num_inference_steps=12: an autoregressive model takes one step per position"):
        autoregressive(num_inference_steps=12)
    with pytest.raises(ValueError, match="choice_temperature=1.0 is for masked models"):
        autoregressive(choice_temperature=1.0)
    images = [
        masked(generator=seeded(), choice_temperature=chance, output_type="indices").images for chance in (4.5, 0)
    ]
    assert torch.equal(masked(generator=seeded(), output_type="indices").images, images[0])
    assert not torch.equal(*images)


def test_offloaded_models_sample_the_same(pipeline):
    """Weights elsewhere: fetched layer by layer, and as a whole."""

    def images():
        return pipeline(class_labels=[0, 1], guidance_scale=2.0, generator=seeded(), output_type="pt").images

    expected, hooks = images(), []
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part, hook = cpu_offload_with_hook(part, "cpu")
            hooks.append(hook)
    torch.testing.assert_close(images(), expected)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            remove_hook_from_module(part)
            cpu_offload(part, torch.device("cpu"))
    assert pipeline.token_model.device.type == "meta"
    torch.testing.assert_close(images(), expected)


def test_bfloat16(pipeline):
    pipeline.to(torch.bfloat16)
    assert pipeline.token_model.dtype == pipeline.vqvae.dtype == torch.bfloat16
    images = pipeline(class_labels=[0, 1], guidance_scale=2.0, generator=seeded(), output_type="np").images
    assert images.dtype == np.float32 and images.std() > 0.01


@pytest.mark.parametrize(
    "options", [{"offload_type": "leaf_level"}, {"num_blocks_per_group": 1}], ids=["leaf", "block"]
)
def test_group_offloading(pipeline, tmp_path, options):
    """To disk, because weights that are there are garbage in memory: on a CPU nothing else would show a wrong read."""
    call = dict(class_labels=[0, 1], guidance_scale=2.0, output_type="pt")
    expected = pipeline(generator=seeded(), **call).images
    pipeline.enable_group_offload(torch.device("cpu"), offload_to_disk_path=str(tmp_path), **options)
    assert torch.equal(pipeline(generator=seeded(), **call).images, expected)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"output_type": "latent"}, "output_type='latent' must be one of 'pil', 'np', 'pt', 'indices'"),
        ({"class_labels": ["cat", "cow"]}, r"class_labels \['cow'\]: expected indices from 0 to 2, or their names"),
        ({"class_labels": 3}, r"class_labels \[3\]: expected indices from 0 to 2"),
        ({"guidance_scale": 2.0}, "guidance_scale=2.0 needs class_labels"),
        ({"num_images": 0}, "num_images=0 must be at least 1"),
        ({"generator": [torch.Generator()]}, "1 generators for 2 images"),
    ],
)
def test_bad_calls(pipeline, options, message):
    with pytest.raises(ValueError, match=message):
        pipeline(**{"num_images": 2} | options)


@both
def test_parts_that_do_not_fit(kind, trained_model, tiny_model):
    with pytest.raises(ValueError, match="token_model is unconditional"):
        pipeline_of(trained_model, kind, num_classes=0)(class_labels=1)
    with pytest.raises(ValueError, match="token_model has 1 x 64 codes per position, but vqvae has 1 x 16"):
        VQGANTokenPipeline(tiny_model, pipeline_of(trained_model, kind).token_model)


WITHOUT_PACKAGE = """
import sys
import torch
sys.modules["hf_vqgan"] = None
from transformers import AutoModel

for kind in ("autoregressive", "masked"):
    model = AutoModel.from_pretrained(f"{kind}/token_model", trust_remote_code=True)
    assert not type(model).__module__.startswith("hf_vqgan")
    torch.save(model(torch.load(f"{kind}.pt")).logits, f"{kind}.logits.pt")
"""


def test_token_models_without_the_package(trained_model, tmp_path):
    """By the code that travels with them."""
    models = {kind: pipeline_of(trained_model, kind).token_model for kind in KINDS}
    for kind, model in models.items():
        model.save_pretrained(tmp_path / kind / "token_model")
        torch.save(model.sample(batch=2), tmp_path / f"{kind}.pt")
    done = subprocess.run([sys.executable, "-c", WITHOUT_PACKAGE], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for kind, model in models.items():
        logits = model(torch.load(tmp_path / f"{kind}.pt")).logits
        torch.testing.assert_close(torch.load(tmp_path / f"{kind}.logits.pt"), logits)


def save_run(folder: Path, pipeline: VQGANTokenPipeline, kind: str) -> None:
    """What a training leaves behind."""
    pipeline.save_pretrained(folder)
    settings = TokenTrainingConfig(vqgan="user/vqgan", dataset_name="user/images", token_model=kind)
    (folder / "training_config.yaml").write_text(yaml.safe_dump(vars(settings)))
    bits = {"bits_per_image" if kind == "autoregressive" else "bits_per_image_upper_bound": 123.45}
    likelihood = {"likelihood_split": "test", "likelihood_images": 200}
    (folder / "metrics.json").write_text(json.dumps({"loss": 3.25, "steps": 1000} | bits | likelihood))
    Image.new("RGB", (8, 8)).save(folder / "samples-1000.png")


PUSH = """
import contextlib, diffusers, numpy, sys, torch
from hf_vqgan.generation.token_models import TokenTrainingConfig
from hf_vqgan.generation.tokens import train_token_model
from hf_vqgan.hub.push import push_pipeline_to_hub

for folder, name in names.items():
    push_pipeline_to_hub(folder, name, license="mit")
    push_pipeline_to_hub(folder, name, variant="bf16")
    whole = diffusers.DiffusionPipeline.from_pretrained(name)
    options = dict(class_labels=["dog", 2], guidance_scale=2.0, generator=torch.manual_seed(0), output_type="np")
    numpy.save(f"{folder}.npy", whole(**options).images)
    half = diffusers.DiffusionPipeline.from_pretrained(name, variant="bf16", torch_dtype=torch.bfloat16)
    print(half.token_model.dtype, whole.token_model.dtype, half(class_labels="eel").images[0].size)
with contextlib.redirect_stdout(sys.stderr):
    train_token_model(TokenTrainingConfig(**training, push_to_hub=True))
pipeline = diffusers.DiffusionPipeline.from_pretrained(training["hub_model_id"])
print(pipeline(class_labels=1).images[0].size)
"""


def test_pushed_with_a_card(trained_model, tmp_path):
    """What a training leaves behind, on the Hub and back, also in half precision; and what a training pushes itself."""
    pipelines = {kind: pipeline_of(trained_model, kind) for kind in KINDS}
    hub = LoopbackHub()
    try:
        names = {str(tmp_path / kind): hub.name(f"{kind}-tokens") for kind in KINDS}
        for kind, pipeline in pipelines.items():
            save_run(tmp_path / kind, pipeline, kind)
        trained = hub.name("trained")
        rows = {"indices": torch.randint(64, (4, 8, 8)).tolist(), "label": [0, 1, 0, 1]}
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "codes.parquet")
        training = dict(
            vqgan=str(tmp_path / "masked" / "vqvae"), dataset_name=str(tmp_path / "codes.parquet"), hidden_size=16,
            class_column="label", output_dir=str(tmp_path / "run"), hub_model_id=trained, num_layers=1, cpu_threads=1,
            num_attention_heads=2, train_batch_size=2, max_train_steps=1, sample_images=2, hub_license="mit",
        )  # fmt: skip
        code = f"names, training = {names!r}, {training!r}\n{PUSH}"
        printed = hub.run(code, tmp_path / "home").splitlines()
        found = {kind: hub.files(name) for kind, name in zip(KINDS, names.values(), strict=True)}
        own = hub.files(trained)
    finally:
        hub.close()
    assert printed == ["torch.bfloat16 torch.float32 (16, 16)"] * 2 + ["(16, 16)"]
    assert own["samples.png"] == (tmp_path / "run" / "samples-1.png").read_bytes()
    assert "Tokens of 4 images of split `train` take" in own["README.md"].decode()
    assert not any(str(tmp_path).encode() in content for content in own.values())
    for kind, pipeline in pipelines.items():
        here = pipeline(class_labels=["dog", 2], guidance_scale=2.0, generator=seeded(), output_type="np").images
        np.testing.assert_allclose(np.load(tmp_path / f"{kind}.npy"), here, atol=1e-5)
    for kind, files in found.items():
        assert {"samples.png", "token_model/model.safetensors", "token_model/model.bf16.safetensors"} <= set(files)
        card = files["README.md"].decode()
        assert "license: mit" in card and "base_model: user/vqgan" in card and "- user/images" in card
        assert "Classes: cat, dog, eel." in card and "8 x 8\ntokens" in card
        call = card.split("= pipeline(")[1].split(").images")[0]
        assert len(eval(f"pipeline({call})", {"pipeline": pipelines[kind]}).images) == 2
        assert ("exact code length" in card) == (kind == "autoregressive")
        at_most = "" if kind == "autoregressive" else "at most "
        assert f"200 images of split `test` take {at_most}123.5 bits per image, given their class." in card


@both
@pytest.mark.parametrize("classes, count, columns, rows", [(3, 7, 2, 3), (3, 2, 1, 2), (0, 5, 3, 2)])
def test_grid_of_samples(kind, trained_model, classes, count, columns, rows):
    """A row per class, as many as there is room for; without classes, about a square."""
    pipeline = pipeline_of(trained_model, kind, classes)
    config = TokenTrainingConfig(vqgan="x", dataset_name="x", token_model=kind, sample_images=count, sample_top_k=3)
    grid = draw_samples(pipeline, config)
    assert grid.size == (columns * 18 + 2, rows * 18 + 2)
    assert draw_samples(pipeline, config) == grid


def test_the_trainer_builds_what_the_pipeline_takes(trained_model):
    config = TokenTrainingConfig(vqgan="x", dataset_name="x", hidden_size=16, num_layers=1, num_attention_heads=2)
    VQGANTokenPipeline(trained_model, build_token_model(config, trained_model, side=8, num_classes=2))
    with pytest.raises(FileNotFoundError, match="not a finished run"):
        push_pipeline_to_hub("nowhere", "user/name")
    assert diffusers.VQGANTokenPipeline is VQGANTokenPipeline
