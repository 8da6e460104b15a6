"""Encoding a dataset, and training a latent diffusion model on it or on images."""

import copy
import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import diffusers
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import SPECIAL, TINY, photo, smooth_pixels
from PIL import Image

import hf_vqgan.generation.diffusion as latent_diffusion
from hf_vqgan import VQGANConfig, VQGANLatentDiffusionPipeline, VQGANModel
from hf_vqgan.data.datasets import ImageTransform, to_pixel_values
from hf_vqgan.generation.denoisers import (
    LatentDiffusionConfig,
    build_denoiser,
    build_schedulers,
    denoising_loss,
    draw,
)
from hf_vqgan.generation.diffusion import train_latent_diffusion
from hf_vqgan.generation.encoded_dataset import EncodingConfig, encode_dataset
from hf_vqgan.generation.samples import LatentSamples, encode_samples, raw_latents

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

SCRIPTS = Path(__file__).parent.parent / "scripts"
CLASSES = ["cat", "dog"]


@pytest.fixture
def vqgan(tmp_path, trained_model) -> str:
    trained_model.save_pretrained(tmp_path / "vqgan")
    return str(tmp_path / "vqgan")


@pytest.fixture
def labelled(tmp_path) -> str:
    """Ten images in a parquet file, with a label, a name and a second picture."""
    folder = tmp_path / "labelled"
    folder.mkdir()
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=CLASSES), name=datasets.Value("string"),
        thumbnail=datasets.Image(),
    )  # fmt: skip
    rows = {
        "image": [photo(number, (20, 16)) for number in range(10)],
        "label": [number % 2 for number in range(10)],
        "name": [f"image {number}" for number in range(10)],
        "thumbnail": [photo(number, (4, 4)) for number in range(10)],
    }
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")
    return str(folder)


def encoding(**fields) -> EncodingConfig:
    return EncodingConfig(**dict(image_column="image", shard_size=4, batch_size=3, cpu_threads=1) | fields)


def files(folder) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in sorted((Path(folder) / "data").iterdir())}


# ------------------------------------------------------------------------------------------------ encoding


@pytest.mark.parametrize("quantizer", ["vq", "residual"])
def test_encoded_rows_are_what_the_model_says(tmp_path, labelled, quantizer):
    model = VQGANModel(VQGANConfig(**TINY | {"quantizer": quantizer} | SPECIAL.get(quantizer, {}))).eval()
    model.save_pretrained(tmp_path / "vqgan")
    found = encode_dataset(str(tmp_path / "vqgan"), labelled, tmp_path / "out", encoding())
    assert found["images"] == 10 and found["images_per_second"] > 0
    assert [*files(tmp_path / "out")] == [f"train-0000{number}-of-00003.parquet" for number in range(3)]
    encoded, source = (datasets.load_dataset(str(path), split="train") for path in (tmp_path / "out", labelled))
    assert set(encoded.column_names) == {"label", "name", "thumbnail", "latents", "indices"}
    assert all(encoded.features[name] == source.features[name] for name in ("label", "name", "thumbnail"))
    assert encoded["name"][:] == source["name"][:] and encoded["label"][:] == source["label"][:]
    raw = [data.cast_column("thumbnail", datasets.Image(decode=False))[0] for data in (encoded, source)]
    assert raw[0]["thumbnail"]["bytes"] == raw[1]["thumbnail"]["bytes"]  # not encoded anew
    for row, original in zip(encoded.with_format("torch"), source, strict=True):
        pixels = torch.from_numpy(np.array(original["image"])).permute(2, 0, 1)[:, :, 2:18]
        with torch.no_grad():
            latents = model.encode(to_pixel_values(pixels)[None]).latents
        torch.testing.assert_close(row["latents"], latents[0], atol=1e-5, rtol=1e-5)
        assert torch.equal(row["indices"], model.quantize(latents).indices[0])


def test_interrupted_encoding_keeps_finished_shards(tmp_path, labelled, vqgan, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    encode_dataset(vqgan, labelled, whole, encoding(latents_dtype="float16"))
    write = datasets.Dataset.to_parquet
    calls = []

    def interrupted(dataset, path):
        calls.append(path)
        if len(calls) == 2:
            (out / "data" / ".train-00001-of-00003.parquet.tmp").write_bytes(b"half a file")
            raise KeyboardInterrupt
        return write(dataset, path)

    with monkeypatch.context() as patch:
        patch.setattr(datasets.Dataset, "to_parquet", interrupted)
        with pytest.raises(KeyboardInterrupt):
            encode_dataset(vqgan, labelled, out, encoding(latents_dtype="float16"))
    first = "train-00000-of-00003.parquet"
    before = files(out)[first]
    assert encode_dataset(vqgan, labelled, out, encoding(latents_dtype="float16"))["images"] == 6
    assert files(out)[first] == before
    assert [*files(out)] == [*files(whole)]
    one, other = (datasets.load_dataset(str(folder), split="train") for folder in (out, whole))
    assert one.features["latents"] == datasets.Array3D(shape=(4, 8, 8), dtype="float16")
    assert one.remove_columns("thumbnail").to_dict() == other.remove_columns("thumbnail").to_dict()
    assert encode_dataset(vqgan, labelled, out, encoding(latents_dtype="float16"))["images"] == 0


def test_full_disk_is_one_error_and_leaves_no_half_shard(tmp_path, labelled, vqgan):
    """pyarrow, writing to the file itself, aborted the process."""
    resource = pytest.importorskip("resource")
    encode_dataset(vqgan, labelled, tmp_path / "before", encoding())  # fills the cache of datasets
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match=r"train-00000-of-00001.parquet could not be written .* same command again"):
            encode_dataset(vqgan, labelled, tmp_path / "out", encoding(shard_size=10))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(tmp_path / "out") == {}
    assert encode_dataset(vqgan, labelled, tmp_path / "out", encoding(shard_size=10))["images"] == 10


def test_other_settings_and_other_weights_are_refused(tmp_path, labelled, vqgan):
    out = tmp_path / "out"
    encode_dataset(vqgan, labelled, out, encoding())
    with pytest.raises(FileExistsError, match="encoded with other settings: shard_size, what"):
        encode_dataset(vqgan, labelled, out, encoding(shard_size=5, what=["indices"]))
    VQGANModel(VQGANConfig(**TINY)).save_pretrained(vqgan)
    with pytest.raises(FileExistsError, match="encoded with other settings: model_sha256"):
        encode_dataset(vqgan, labelled, out, encoding())
    with pytest.raises(FileExistsError, match="is not empty and has no encoding.json"):
        encode_dataset(vqgan, labelled, tmp_path, encoding())


def test_unreadable_images_lose_their_row(tmp_path, labelled, vqgan, caplog):
    source = datasets.load_dataset(labelled, split="train").cast_column("image", datasets.Image(decode=False))
    broken = source.map(lambda row, n: {"image": {"bytes": b"?", "path": None}} if n == 3 else row, with_indices=True)
    broken.to_parquet(Path(labelled) / "train.parquet")
    assert encode_dataset(vqgan, labelled, tmp_path / "out", encoding(what=["indices"]))["images"] == 9
    encoded = datasets.load_dataset(str(tmp_path / "out"), split="train")
    assert encoded["name"][:] == [f"image {number}" for number in range(10) if number != 3]
    assert "latents" not in encoded.column_names
    assert "left out an unreadable image" in caplog.text


def launch(script: str, *arguments: str, processes: int = 1) -> str:
    """A script under `accelerate launch`; what it prints."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    several = ["--multi_gpu", "--num_processes", str(processes), "--main_process_port", str(port)]
    command = [sys.executable, "-m", "accelerate.commands.launch", *(several if processes > 1 else [])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, str(SCRIPTS / script), *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_processes_encode_the_same_dataset(tmp_path, labelled, vqgan):
    flags = ["--image_column", "image", "--shard_size", "4", "--batch_size", "3", "--cpu_threads", "1"]
    printed = launch("encode_dataset.py", vqgan, labelled, str(tmp_path / "two"), *flags, processes=2)
    assert "encoded 10 images in" in printed and "images/s" in printed
    encode_dataset(vqgan, labelled, tmp_path / "one", encoding())
    one, two = (tmp_path / name for name in ("one", "two"))
    assert [*files(one)] == [*files(two)]
    for name in files(one):
        assert (one / "data" / name).read_bytes() == (two / "data" / name).read_bytes()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"splits": ["test"]}, "no split 'test'; it has train"),
        ({"image_column": None}, r"several image columns \(image, thumbnail\)"),
        ({"resolution": 15}, "resolution=15 is not a multiple of 2"),
    ],
)
def test_bad_encodings(tmp_path, labelled, vqgan, fields, message):
    with pytest.raises(ValueError, match=message):
        encode_dataset(vqgan, labelled, tmp_path / "out", encoding(**fields))
    assert not (tmp_path / "out").exists()  # or the mended command would be refused it, as it has other settings


def test_bad_encoding_configs():
    with pytest.raises(ValueError, match="what=.*'pixels'.* must be one of"):
        EncodingConfig(what=["pixels"])
    with pytest.raises(ValueError, match="what is empty"):
        EncodingConfig(what=[])


# ------------------------------------------------------------------------------------------------ the loss


def diffusion(vqgan: str, dataset: str, output_dir, **fields) -> LatentDiffusionConfig:
    defaults = dict(
        vqgan=vqgan,
        dataset_name=dataset,
        output_dir=str(output_dir),
        image_column="image",
        class_column="label",
        block_out_channels=[8, 16],
        layers_per_block=1,
        attention_levels=1,
        norm_num_groups=4,
        attention_head_dim=4,
        num_layers=1,
        num_attention_heads=2,
        train_batch_size=4,
        max_train_steps=4,
        lr_warmup_steps=1,
        logging_steps=1,
        checkpointing_steps=2,
        sample_steps=2,
        sample_images=4,
        sample_inference_steps=2,
        cpu_threads=1,
    )
    return LatentDiffusionConfig(**defaults | fields)


class Remembers(torch.nn.Module):
    """A denoiser that returns what it was told to, and keeps what it saw."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.weight = answer, torch.nn.Parameter(torch.zeros(()))

    def forward(self, sample, timestep, **condition):
        self.seen = sample, timestep, condition
        return diffusers.models.unets.unet_2d.UNet2DOutput(self.answer)


@pytest.mark.parametrize(
    "objective, prediction", [("flow_matching", "v_prediction"), ("ddpm", "epsilon"), ("ddpm", "v_prediction")]
)
def test_loss_is_zero_for_the_right_answer_only(objective, prediction):
    """Targets worked out by hand: x = (1-σ) z + σ ε and ε - z; x = √ᾱ z + √(1-ᾱ) ε and ε, or √ᾱ ε - √(1-ᾱ) z."""
    config = diffusion("m", "d", "o", objective=objective, prediction_type=prediction)
    scheduler, _ = build_schedulers(config)
    z, noise, levels = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0.0, 0.4, 0.999])
    if objective == "flow_matching":
        sigma = (1 - levels).view(-1, 1, 1, 1)
        noisy, answer = (1 - sigma) * z + sigma * noise, noise - z
    else:
        alpha = scheduler.alphas_cumprod[(999 - (levels * 1000).long())].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * z + (1 - alpha).sqrt() * noise
        answer = noise if prediction == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * z
    labels = torch.tensor([0, 1, 2])
    denoiser = Remembers(answer)
    assert denoising_loss(denoiser, scheduler, z, noise, levels, labels) < 1e-9
    sample, timesteps, condition = denoiser.seen
    torch.testing.assert_close(sample, noisy, atol=2e-3, rtol=0)
    assert timesteps.tolist() == pytest.approx([1000 - (objective == "ddpm"), 600 - (objective == "ddpm"), 1.0
                                                - (objective == "ddpm")], abs=1e-3)  # fmt: skip
    assert torch.equal(condition["class_labels"], labels)
    assert denoising_loss(Remembers(answer + 1), scheduler, z, noise, levels, None) == pytest.approx(1, abs=1e-5)


def test_draws_depend_on_the_sample_alone():
    config = diffusion("m", "d", "o", label_dropout=0.25)
    numbers = torch.arange(400)
    noise, levels, dropped = draw(numbers, (4, 2, 2), config)
    some = draw(numbers[[7, 3]], (4, 2, 2), config)
    for whole, part in zip((noise, levels, dropped), some, strict=True):
        assert torch.equal(whole[[7, 3]], part)
    assert abs(noise.mean()) < 0.05 and noise.std() == pytest.approx(1, abs=0.05)
    assert 0.15 < dropped.float().mean() < 0.35
    assert levels.min() >= 0 and levels.max() < 1
    assert levels.std() < 0.25  # logit-normal: 0.21; uniform: 0.29
    assert draw(numbers, (1,), dataclasses.replace(config, timestep_sampling="uniform"))[1].std() > 0.26
    assert not torch.equal(draw(numbers, (4, 2, 2), dataclasses.replace(config, seed=1))[0], noise)


def test_dit_has_one_rule_for_dropping_labels():
    """In diffusers' DiT every block drops labels on its own in training: the same input gives different outputs."""
    dit = build_denoiser(diffusion("m", "d", "o", denoiser="dit"), 4, 8, 2).train()
    torch.nn.init.normal_(dit.proj_out_2.weight)
    call = dict(timestep=torch.ones(64), class_labels=torch.ones(64, dtype=torch.int64))
    outputs = dit(torch.ones(64, 4, 8, 8), **call).sample
    torch.testing.assert_close(outputs, outputs[:1].expand_as(outputs))


# ------------------------------------------------------------------------------------------------ a run


@pytest.fixture
def encoded(tmp_path, labelled, vqgan) -> str:
    encode_dataset(vqgan, labelled, tmp_path / "encoded", encoding())
    return str(tmp_path / "encoded")


def test_what_a_run_leaves_behind(tmp_path, vqgan, labelled, trained_model):
    folder = tmp_path / "run"
    metrics = train_latent_diffusion(diffusion(vqgan, labelled, folder))
    assert {file.name for file in folder.iterdir()} == {
        "model_index.json", "vqvae", "denoiser", "scheduler", "metrics.json", "log.jsonl", "training_config.yaml",
        "samples-2.png", "samples-4.png", "checkpoint-2", "checkpoint-4", ".lock",
    }  # fmt: skip
    assert json.loads((folder / "metrics.json").read_text()) == metrics and metrics["steps"] == 4
    with Image.open(folder / "samples-4.png") as grid:
        assert grid.size == (2 * 18 + 2, 2 * 18 + 2)  # a row per class
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    assert isinstance(pipeline, VQGANLatentDiffusionPipeline)
    assert isinstance(pipeline.vqvae, VQGANModel) and pipeline.config.id2label == {"0": "cat", "1": "dog"}
    assert pipeline.vqvae.config.scaling_factor == trained_model.config.scaling_factor
    image = pipeline(class_labels="dog", num_inference_steps=2, output_type="pt").images
    assert image.shape == (1, 3, 16, 16)
    before = (folder / "denoiser" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    assert train_latent_diffusion(diffusion(vqgan, labelled, folder)) == metrics  # complete: left alone
    assert (folder / "denoiser" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="differs in: learning_rate"):
        train_latent_diffusion(diffusion(vqgan, labelled, folder, learning_rate=1e-3))


@pytest.mark.parametrize(
    "fields",
    [
        {"denoiser": "dit", "objective": "ddpm", "what": ["latents"]},
        {"denoiser": "unet", "class_column": None, "what": ["indices"]},
        {"denoiser": "dit", "class_column": None, "what": ["indices"], "objective": "ddpm"},
    ],
    ids=["dit-classes-latents", "unet-indices", "dit-indices"],
)
def test_training_on_an_encoded_dataset(tmp_path, vqgan, labelled, fields):
    fields = dict(fields)
    encode_dataset(vqgan, labelled, tmp_path / "encoded", encoding(what=fields.pop("what")))
    config = diffusion(vqgan, str(tmp_path / "encoded"), tmp_path / "run", max_train_steps=2, **fields)
    assert np.isfinite(train_latent_diffusion(config)["loss"])
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "run")
    kinds = {"dit": diffusers.DiTTransformer2DModel, "unet": diffusers.UNet2DModel}
    assert isinstance(pipeline.denoiser, kinds[config.denoiser])
    assert pipeline(num_inference_steps=2, output_type="pt").images.isfinite().all()


def test_images_and_their_encoding_train_the_same_model(tmp_path, vqgan, labelled, encoded):
    """Pixels encoded at every step or once, latents read from disk: the same latents, classes and noise."""
    cases = {"every step": (labelled, 0.0), "once": (labelled, 1.0), "from disk": (encoded, 0.0)}
    models = []
    for name, (dataset, room) in cases.items():
        train_latent_diffusion(diffusion(vqgan, dataset, tmp_path / name, latent_cache_gb=room))
        models.append(diffusers.UNet2DModel.from_pretrained(tmp_path / name / "denoiser"))
    for one, *others in zip(*(model.parameters() for model in models), strict=True):
        for other in others:
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_what_is_encoded_once(tmp_path, vqgan, labelled, trained_model, capsys):
    """Deterministic crops only, as many as fit; an unreadable image's stand-in brings its own label along."""
    broken = datasets.load_dataset(labelled, split="train").cast_column("image", datasets.Image(decode=False))
    broken = broken.map(lambda row, n: {"image": {"bytes": b"?", "path": None}} if n == 3 else row, with_indices=True)
    samples = LatentSamples(broken, ImageTransform(16, center_crop=True, random_flip=False), "d", "image", "label")
    assert samples.fixed
    encoded = encode_samples(
        samples, lambda batch: raw_latents(trained_model, batch), "latents", Accelerator(), batch_size=4
    )
    assert encoded.labels.tolist() == [0, 1, 0, 0, 0, 1, 0, 1, 0, 1]
    for number in (0, 2, 13):
        pixels = samples[number]["pixel_values"]
        with torch.no_grad():
            latents = trained_model.encode(pixels[None]).latents[0]
        torch.testing.assert_close(encoded[number]["latents"], latents, atol=1e-5, rtol=0)
        assert encoded[number]["number"] == number
    for fields, reason in (
        ({}, "encoded once"),
        ({"random_flip": True}, "encoded at every step, as crops are random"),
        ({"latent_cache_gb": 1e-6}, "more than --latent_cache_gb"),
    ):
        train_latent_diffusion(diffusion(vqgan, labelled, tmp_path / "run", **fields), dry_run=True)
        assert reason in capsys.readouterr().out


def test_latest_starts_a_run_and_trackers_get_its_settings(tmp_path, vqgan, encoded, capsys):
    pytest.importorskip("tensorboard")
    fields = dict(
        resume_from_checkpoint="latest", report_to="tensorboard", hub_token="hf_very_secret", max_train_steps=1
    )
    config = diffusion(vqgan, encoded, tmp_path / "run", **fields)
    train_latent_diffusion(config)
    assert "no checkpoint in" in capsys.readouterr().out
    assert "hf_very_secret" not in repr(config)
    files = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any(b"learning_rate" in content for content in files)
    assert not any(b"hf_very_secret" in content for content in files)
    train_latent_diffusion(dataclasses.replace(config, logging_steps=7, sample_steps=3))
    assert "already complete (1 steps)" in capsys.readouterr().out


def test_resumed_run_ends_in_the_same_weights(tmp_path, vqgan, encoded, monkeypatch):
    whole, stopped = (diffusion(vqgan, encoded, tmp_path / name) for name in ("whole", "stopped"))
    train_latent_diffusion(whole)
    loss = latent_diffusion.denoising_loss
    calls = []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 4:  # the last checkpoint is that of step 2
            raise KeyboardInterrupt
        return loss(*args)

    with monkeypatch.context() as patch:
        patch.setattr(latent_diffusion, "denoising_loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_latent_diffusion(stopped)
    assert not (tmp_path / "stopped" / "checkpoint-4").exists()
    train_latent_diffusion(stopped)
    models = [diffusers.UNet2DModel.from_pretrained(tmp_path / name / "denoiser") for name in ("whole", "stopped")]
    assert all(torch.equal(one, other) for one, other in zip(*(m.parameters() for m in models), strict=True))
    logs = [
        [
            {name: value for name, value in json.loads(line).items() if name not in ("samples_per_second", "data_wait")}
            for line in (tmp_path / name / "log.jsonl").read_text().splitlines()
        ]
        for name in ("whole", "stopped")
    ]
    assert logs[0] == logs[1]
    pictures = [(tmp_path / name / "samples-4.png").read_bytes() for name in ("whole", "stopped")]
    assert pictures[0] == pictures[1]


def test_two_processes_accumulating_equal_one_large_batch(tmp_path, vqgan, encoded):
    config = diffusion(vqgan, encoded, tmp_path / "one", train_batch_size=8, adam_epsilon=1e-2)
    train_latent_diffusion(config)
    flags = []
    for name, value in dataclasses.asdict(
        dataclasses.replace(config, output_dir=str(tmp_path / "two"), train_batch_size=2, gradient_accumulation_steps=2)
    ).items():
        if value is not None and value != []:
            flags += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    launch("train_latent_diffusion.py", *flags, processes=2)
    logs = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)
    models = [diffusers.UNet2DModel.from_pretrained(tmp_path / name / "denoiser") for name in ("one", "two")]
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)


def test_the_model_learns_which_class_is_which(tmp_path, trained_model):
    """Two pictures, one per class: after a short training, samples of a class look like its picture."""
    model = copy.deepcopy(trained_model)
    latents = model.encode(torch.stack([smooth_pixels(seed, 16) for seed in range(2)])).latents
    model.config.scaling_factor, model.config.shift_factor = 1 / float(latents.std()), float(latents.mean())
    model.save_pretrained(tmp_path / "vqgan")
    rows = {"latents": latents[[0, 1] * 16].numpy(), "label": [0, 1] * 16}
    features = datasets.Features(
        latents=datasets.Array3D(shape=(4, 8, 8), dtype="float32"), label=datasets.ClassLabel(names=["first", "second"])
    )
    (tmp_path / "pictures").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "pictures" / "train.parquet")
    config = diffusion(
        str(tmp_path / "vqgan"), str(tmp_path / "pictures"), tmp_path / "run", max_train_steps=150, train_batch_size=16,
        learning_rate=3e-3, logging_steps=50, checkpointing_steps=150, sample_steps=150, ema_decay=0.9,
    )  # fmt: skip
    train_latent_diffusion(config)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "run")
    pipeline.set_progress_bar_config(disable=True)
    samples = pipeline(
        batch_size=3, class_labels=["first", "second"], num_inference_steps=8, output_type="latent",
        generator=torch.manual_seed(0),
    ).images  # fmt: skip
    distances = (samples[:, None] - latents).square().mean(dim=(2, 3, 4))  # of 6 samples from 2 pictures
    assert distances.argmin(dim=1).tolist() == [0, 0, 0, 1, 1, 1]
    assert distances.min(dim=1).values.max() < 0.5 * (latents[0] - latents[1]).square().mean()


def test_dry_run_writes_nothing(tmp_path, vqgan, labelled, capsys):
    assert train_latent_diffusion(diffusion(vqgan, labelled, tmp_path / "run"), dry_run=True) == {}
    plan = capsys.readouterr().out
    assert "10 rows of pixel_values, 2 classes" in plan and "4 x 8 x 8" in plan and "scaling factor 0.8" in plan
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"train_split": "test"}, "no split 'test'; it has train"),
        ({"class_column": "kind"}, "class_column='kind' is not a column; columns: image, label"),
        ({"class_column": "name"}, "class_column='name' is Value.*expected class numbers"),
        ({"block_out_channels": [8] * 5}, "halve 4 times, which latents of side 8"),
        ({"attention_head_dim": 5}, r"attention_head_dim=5 does not divide \[8, 16\]"),
        ({"denoiser": "dit", "patch_size": 3}, "patch_size=3 does not divide the latents' side 8"),
        ({"max_train_samples": 2, "resolution": 15}, "15x15 is not a multiple of 2"),
    ],
)
def test_bad_settings_write_nothing(tmp_path, vqgan, labelled, fields, message):
    with pytest.raises(ValueError, match=message):
        train_latent_diffusion(diffusion(vqgan, labelled, tmp_path / "run", **fields))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"vqgan": ""}, "vqgan is empty"),
        ({"dataset_name": ""}, "dataset_name is empty"),
        ({"label_dropout": 1.5}, r"label_dropout=1.5 must be in \[0, 1\]"),
        ({"objective": "score"}, "objective='score' must be one of"),
        ({"sample_steps": 0}, "sample_steps=0 must be at least 1"),
        ({"objective": "ddpm", "sample_inference_steps": 1001}, "1001: with objective='ddpm' there are 1000"),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises(ValueError, match=message):
        LatentDiffusionConfig(**{"vqgan": "m", "dataset_name": "d"} | fields)
