"""Training a model of tokens on images or on an encoded dataset, and the likelihood of held-out images."""

import copy
import dataclasses
import itertools
import json
from pathlib import Path

import datasets
import diffusers
import numpy as np
import pytest
import torch
from conftest import SPECIAL, TINY, photo
from PIL import Image
from safetensors.torch import load_file
from test_latent_diffusion import launch
from test_token_models import build, some_indices

from hf_vqgan import (
    AutoregressiveTokenModel,
    MaskedTokenModel,
    VQGANConfig,
    VQGANModel,
    VQGANTokenPipeline,
)
from hf_vqgan.data.datasets import to_pixel_values
from hf_vqgan.generation.encoded_dataset import EncodingConfig, encode_dataset
from hf_vqgan.generation.likelihood import sum_bits
from hf_vqgan.generation.samples import EncodedSamples
from hf_vqgan.generation.token_models import TokenTrainingConfig
from hf_vqgan.generation.tokens import train_token_model

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

TIMED = {"seconds", "samples_per_second"}


@pytest.fixture
def vqgan(tmp_path, trained_model) -> str:
    trained_model.save_pretrained(tmp_path / "vqgan")
    return str(tmp_path / "vqgan")


@pytest.fixture
def labelled(tmp_path) -> str:
    """Ten images to train on and three to test with, in two classes."""
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]))
    for split, count in (("train", 10), ("test", 3)):
        numbers = range(count)
        images = [photo(number + 100 * (split == "test"), (20, 16)) for number in numbers]
        rows = {"image": images, "label": [number % 2 for number in numbers]}
        (tmp_path / "labelled").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "labelled" / f"{split}.parquet")
    return str(tmp_path / "labelled")


def settings(vqgan: str, dataset: str, output_dir: Path, **fields) -> TokenTrainingConfig:
    defaults = dict(
        vqgan=vqgan, dataset_name=dataset, output_dir=str(output_dir), class_column="label", hidden_size=16,
        num_layers=1, num_attention_heads=2, num_depth_layers=1, dropout=0.0, train_batch_size=4, max_train_steps=3,
        lr_warmup_steps=1, logging_steps=1, sample_images=4, sample_inference_steps=3, cpu_threads=1,
    )  # fmt: skip
    return TokenTrainingConfig(**defaults | fields)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "token_model" / "model.safetensors")


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("classes", [True, False], ids=["classes", "none"])
@pytest.mark.parametrize(
    "kind, quantizer", [("autoregressive", "vq"), ("autoregressive", "residual"), ("masked", "residual")]
)
def test_what_a_run_leaves_behind(tmp_path, labelled, kind, quantizer, classes):
    vqgan = VQGANModel(VQGANConfig(**TINY | {"quantizer": quantizer} | SPECIAL.get(quantizer, {}))).eval()
    for codebook in vqgan.quantize.codebook_parameters():
        torch.nn.init.normal_(codebook, std=0.5)
    vqgan.save_pretrained(tmp_path / "vqgan")
    column = "label" if classes else None
    folder = tmp_path / "run"
    config = settings(str(tmp_path / "vqgan"), labelled, folder, token_model=kind, class_column=column)
    metrics = train_token_model(config)
    assert {file.name for file in folder.iterdir()} == {
        "model_index.json", "vqvae", "token_model", "metrics.json", "log.jsonl", "training_config.yaml",
        "samples-3.png", "checkpoint-3", ".lock",
    }  # fmt: skip
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    with Image.open(folder / "samples-3.png") as grid:
        assert grid.size == (2 * 18 + 2, 2 * 18 + 2)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    kinds = {"autoregressive": AutoregressiveTokenModel, "masked": MaskedTokenModel}
    assert isinstance(pipeline, VQGANTokenPipeline) and isinstance(pipeline.token_model, kinds[kind])
    assert pipeline.config.id2label == ({"0": "cat", "1": "dog"} if classes else None)
    assert pipeline(class_labels="dog" if classes else None, output_type="pt").images.shape == (1, 3, 16, 16)

    # The metrics' likelihood is that of the saved model on the images of the test split, given their classes.
    rows = datasets.load_dataset(labelled, split="test")
    indices = vqgan.encode_indices(central_squares(rows))
    labels = torch.tensor(rows["label"][:]) if classes else None
    assert metrics["likelihood_split"] == "test" and metrics["likelihood_images"] == 3
    count = indices[0].numel()
    if kind == "autoregressive":
        bits = pipeline.token_model.bits(indices, labels).mean().item()
        assert metrics["bits_per_image"] == pytest.approx(bits, rel=1e-5)
        assert metrics["bits_per_token"] == pytest.approx(bits / count, rel=1e-5)
        assert all(row["bits_per_token"] == pytest.approx(row["loss"] * 1.442695, rel=1e-5) for row in rows_of(folder))
    else:
        generator = torch.Generator().manual_seed(1)
        bits = pipeline.token_model.bits_upper_bound(indices, labels, 200, generator).mean().item()
        assert metrics["bits_per_image_upper_bound"] == pytest.approx(bits, rel=0.05)
        assert metrics["bits_per_token_upper_bound"] == metrics["bits_per_image_upper_bound"] / count
        assert "bits_per_image" not in metrics and "bits_per_token" not in rows_of(folder)[0]


def central_squares(rows: datasets.Dataset) -> torch.Tensor:
    """Central squares of 16 pixels, of images of 20 x 16."""
    pixels = [torch.from_numpy(np.array(image)).permute(2, 0, 1)[:, :, 2:18] for image in rows["image"]]
    return torch.stack([to_pixel_values(image) for image in pixels])


def test_images_and_their_encoding_train_the_same_model(tmp_path, vqgan, labelled):
    """Pixels encoded at every step or once, indices and latents from disk: the same tokens, classes and draws."""
    for what in ("indices", "latents"):
        encoding = EncodingConfig(image_column="image", what=[what], cpu_threads=1)
        encode_dataset(vqgan, labelled, tmp_path / what, encoding)
    cases = {"every step": (labelled, 0.0), "once": (labelled, 1.0), "i": (str(tmp_path / "indices"), 0.0),
             "j": (str(tmp_path / "indices"), 1.0), "l": (str(tmp_path / "latents"), 1.0)}  # fmt: skip
    found, bits = [], []
    for name, (dataset, room) in cases.items():
        metrics = train_token_model(settings(vqgan, dataset, tmp_path / name, latent_cache_gb=room, dropout=0.1))
        bits.append(metrics["bits_per_image"])
        found.append(weights(tmp_path / name))
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in found[0] | other)
    assert len(set(bits)) == 1


def test_two_processes_accumulating_equal_one_large_batch(tmp_path, vqgan, labelled):
    config = settings(vqgan, labelled, tmp_path / "one", train_batch_size=8, adam_epsilon=1e-2, random_order=0.9)
    metrics = train_token_model(config)
    two = dataclasses.replace(
        config, output_dir=str(tmp_path / "two"), train_batch_size=2, gradient_accumulation_steps=2
    )
    given = {name: value for name, value in dataclasses.asdict(two).items() if value is not None}
    flags = itertools.chain.from_iterable((f"--{name}", str(value)) for name, value in given.items())
    launch("train_token_model.py", *flags, processes=2)
    losses = [[row["loss"] for row in rows_of(tmp_path / name)] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    one, other = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one | other:
        torch.testing.assert_close(one[name], other[name], atol=1e-5, rtol=1e-3)
    theirs = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert theirs["bits_per_image"] == pytest.approx(metrics["bits_per_image"], rel=1e-4)
    assert theirs["likelihood_images"] == metrics["likelihood_images"] == 3


@pytest.mark.parametrize("kind", ["autoregressive", "masked"])
def test_bits_of_parts_add_up_whatever_their_batches(kind):
    """So processes may share the images: every image's bits, and what is random about them, are its own."""
    model = build(kind, num_codebooks=2)
    samples = EncodedSamples("indices", some_indices(model, 7).int(), torch.tensor([0, 1, 2, 0, 1, 2, 0]))
    large, small = (settings("m", "d", Path("r"), train_batch_size=size) for size in (8, 2))
    whole = sum_bits(model, samples, range(7), large)
    parts = [sum_bits(model, samples, range(rank, 7, 3), small) for rank in range(3)]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-6, atol=0)
    if kind == "masked":
        other = dataclasses.replace(large, seed=1)
        assert sum_bits(model, samples, range(7), other) != whole


def test_which_images_are_held_out(tmp_path, vqgan, labelled, capsys):
    def measured(name, **fields):
        fields = {"max_train_steps": 1} | fields
        return train_token_model(settings(vqgan, labelled, tmp_path / name, **fields))

    found = measured("train", validation_split="train", max_train_samples=5)
    assert (found["likelihood_split"], found["likelihood_images"]) == ("train", 5)
    assert measured("some", likelihood_images=2)["likelihood_images"] == 2
    assert not any("likelihood" in name or "bits" in name for name in measured("none", likelihood_images=0))
    (Path(labelled) / "test.parquet").unlink()
    assert measured("only")["likelihood_split"] == "train"
    train_token_model(settings(vqgan, labelled, tmp_path / "dry"), dry_run=True)
    plan = capsys.readouterr().out
    assert "likelihood: of 10 images of split 'train'" in plan and "a sample and its likelihood went through" in plan
    assert "8 x 8 of 64 codes" in plan and "encoded once, 2.6e-06 GB" in plan


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"train_split": "dev"}, "no split 'dev'; it has"),
        ({"validation_split": "dev"}, "no split 'dev'; it has"),
        ({"class_column": "kind"}, "class_column='kind' is not a column"),
        ({"hidden_size": 18}, "hidden_size=18 must be a multiple of 4 x num_attention_heads=2"),
        ({"resolution": 15}, "15x15 is not a multiple of 2"),
    ],
)
def test_bad_settings_write_nothing(tmp_path, vqgan, labelled, fields, message):
    with pytest.raises(ValueError, match=message):
        train_token_model(settings(vqgan, labelled, tmp_path / "run", **fields))
    assert not (tmp_path / "run").exists()


def write_rows(folder: Path, **splits) -> str:
    """A dataset of encoded images, given their splits' columns."""
    folder.mkdir()
    for split, columns in splits.items():
        datasets.Dataset.from_dict(columns).to_parquet(folder / f"{split}.parquet")
    return str(folder)


GRID, WIDE = [[1, 2], [3, 4]], [[1, 2, 3], [4, 5, 6]]
LARGER = [[0] * 3] * 3


@pytest.mark.parametrize(
    "splits, message",
    [
        ({"train": {"indices": [[[99, 0], [0, 0]]], "label": [0]}}, r"in \[0, 99\]: this VQ-GAN has .* in \[0, 63\]"),
        ({"train": {"indices": [WIDE], "label": [0]}}, "has 2 x 3 tokens per image, but token models have a square"),
        ({"train": {"latents": [[[[0.5]]]], "label": [0]}}, "this VQ-GAN has 4 channels"),
        ({"train": {"indices": [GRID], "label": [0]}, "test": {"indices": [LARGER], "label": [0]}},
         r"shape \(2, 2\) in split 'train' and \(3, 3\) in 'test'"),
        ({"train": {"indices": [GRID], "label": [0]}, "test": {"indices": [GRID], "label": [1]}},
         "'label' goes up to 1 in split 'test', but 'train' has 1 classes"),
        ({"train": {"indices": [GRID], "label": [0]}, "test": {"indices": [GRID], "label": [-1]}},
         r"split 'test', whose likelihood .* with -1 in row 0: .* Choose another --validation_split"),
        ({"train": {"indices": [GRID] * 2, "label": [0, 10**9]}}, "with 1000000000 in row 1: .* below 1,000,000"),
        ({"train": {"latents": ["text"], "label": [0]}}, "row 0 have no numbers of one shape; expected"),
        ({"train": {"latents": [[0.5]], "label": [0]}}, r"row 0 have shape \(1,\); expected \(D, h, w\)"),
    ],
    ids=["codes", "wide", "channels", "grids", "classes", "unlabelled", "ids", "text", "flat"],
)  # fmt: skip
def test_encodings_that_do_not_fit_are_refused_at_once(tmp_path, vqgan, splits, message):
    dataset = write_rows(tmp_path / "encoded", **copy.deepcopy(splits))
    with pytest.raises(ValueError, match=message):
        train_token_model(settings(vqgan, dataset, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("row, found", [(WIDE, r"shape \(2, 3\)"), (None, "no numbers of one shape")])
def test_a_later_row_that_does_not_fit_is_named(tmp_path, vqgan, row, found):
    dataset = write_rows(tmp_path / "encoded", train={"indices": [GRID, row], "label": [0, 0]})
    with pytest.raises(ValueError, match=rf"encoded': indices in row 1 have {found}; expected \(h, w\) or"):
        train_token_model(settings(vqgan, dataset, tmp_path / "run"))
