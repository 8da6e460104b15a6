"""`hf-vqgan evaluate-generation`: from pipelines, folders and archives to generation.json, a table and pictures."""

import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import photo, smooth_pixels
from PIL import Image
from test_evaluation import random_inception  # noqa: F401 (a fixture)
from test_pipelines import UNET, tiny_dit, tiny_unet
from torch_fidelity import feature_extractor_inceptionv3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from hf_vqgan import VQGANLatentDiffusionPipeline
from hf_vqgan.commands.evaluate_generation import make_parser
from hf_vqgan.evaluation.generation import GenerationConfig, evaluate_generation
from hf_vqgan.evaluation.generation_report import titles
from hf_vqgan.evaluation.sample_sources import share_out, to_uint8
from hf_vqgan.measurement.frechet import InceptionFeatures, to_bytes

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch_dtype.*:FutureWarning"),
]


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """40 real and 20 held-out images of 16 pixels, in three classes of 20, 12 and 8."""
    folder = tmp_path_factory.mktemp("photos")
    for split, counts in (("train", (20, 12, 8)), ("test", (10, 6, 4))):
        for number, count in enumerate(counts):
            place = folder / split / f"class{number}"
            place.mkdir(parents=True)
            for item in range(count):
                photo(1000 * (split == "test") + 100 * number + item, (16, 16)).save(place / f"{item:02d}.png")
    return str(folder)


@pytest.fixture(scope="session")
def latent_pipeline(tiny_pipeline, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("latent")
    tiny_pipeline.save_pretrained(folder)
    return str(folder)


def stock_pipeline(kind: str, folder: Path, vqvae) -> str:
    if kind == "ddpm":
        blocks = dict(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
        unet = diffusers.UNet2DModel(**UNET | blocks | {"in_channels": 3, "out_channels": 3, "sample_size": 16})
        diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(folder)
    elif kind == "dit":
        kl = diffusers.AutoencoderKL(block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
                                     up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4)  # fmt: skip
        diffusers.DiTPipeline(tiny_dit(1000, 8), kl, diffusers.DDIMScheduler()).save_pretrained(folder)
    else:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        VQGANLatentDiffusionPipeline(vqvae, tiny_unet(), scheduler).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def attempt(photos, backbone, tmp_path):
    """Runs an evaluation with few samples in the features of a tiny vision model; returns generation.json."""

    def run(*names: str, **options) -> dict:
        quick = dict(dataset_name=photos, num_samples=12, num_inference_steps=2, features=[backbone], batch_size=8)
        config = GenerationConfig(**quick | {"output_dir": str(tmp_path / "out")} | options)
        evaluate_generation(list(names), config)
        return json.loads((Path(config.output_dir) / "generation.json").read_text())

    return run


def read_pixels(folder: Path) -> torch.Tensor:
    return torch.stack([torch.tensor(np.array(Image.open(file))) for file in sorted(folder.rglob("*.png"))]).permute(
        0, 3, 1, 2
    )


def figures_of(row: dict) -> dict[str, float]:
    told = ("guidance_scale", "samples_per_second")
    return {name: value for name, value in row.items() if isinstance(value, (int, float)) and name not in told}


def test_figures_are_torch_fidelitys(latent_pipeline, photos, random_inception, attempt, tmp_path, monkeypatch):  # noqa: F811
    """The whole chain, from a pipeline to generation.json, against the library on the files of the same images."""
    monkeypatch.setattr(feature_extractor_inceptionv3.FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", 75)  # for speed
    monkeypatch.setattr("hf_vqgan.evaluation.generation.frechet_distance", lambda *moments: 7.0)  # of sFID
    options = dict(features=["inception"], inception_weights_path=str(random_inception), held_out_split="none")
    found = attempt(latent_pipeline, **options, save_samples=True)
    network = feature_extractor_inceptionv3.FeatureExtractorInceptionV3(
        "random", ["2048", "logits_unbiased"], str(random_inception)
    )
    with torch.no_grad():
        (made, logits), (real, _) = (
            network(read_pixels(folder)) for folder in (tmp_path / "out" / "samples", Path(photos, "train"))
        )
    assert len(made) == found["num_images"] == 12 and found["sfid"] == 7.0
    statistics = [fid_features_to_statistics(features.double()) for features in (made, real)]
    fid = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert found["gfid"] == pytest.approx(fid, rel=1e-3)
    kid = kid_features_to_metric(made.double(), real.double(), kid_subset_size=6, verbose=False)
    assert found["gkid"] == pytest.approx(kid["kernel_inception_distance_mean"], rel=1e-3)
    assert found["gkid_std"] == pytest.approx(kid["kernel_inception_distance_std"], rel=1e-3)
    score = isc_features_to_metric(logits)
    assert found["inception_score"] == pytest.approx(score["inception_score_mean"], rel=1e-4)
    prc = prc_features_to_metric(made, real, verbose=False)
    assert (found["precision"], found["recall"]) == pytest.approx((prc["precision"], prc["recall"]), abs=1e-6)
    assert found["skipped"] == {} and found["protocol"]["features"]["inception"]["weights_sha256"]
    assert "gFID" in (tmp_path / "out" / "generation.md").read_text()


def test_spatial_features_are_those_of_sfid(random_inception):  # noqa: F811
    """Seven channels of the first 1x1 convolution in the third of the four 17x17 blocks, channels last."""
    network = InceptionFeatures(str(random_inception))
    pixels = smooth_pixels(0, 32)[None]
    pooled, _, spatial = network.with_spatial(pixels)
    layers = network.network
    hidden = interpolate_bilinear_2d_like_tensorflow1x(to_bytes(pixels).float(), size=(299, 299), align_corners=False)
    hidden = (hidden - 128) / 128
    for name in ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3",
                 "MaxPool_2", "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c"):  # fmt: skip
        hidden = getattr(layers, name)(hidden)
    expected = layers.Mixed_6d.branch1x1(hidden)[0, :7]
    assert spatial.shape == (1, 2023) and expected.shape == (7, 17, 17) and expected.std() > 0
    torch.testing.assert_close(spatial.view(17, 17, 7), expected.permute(1, 2, 0))
    torch.testing.assert_close(pooled, network(pixels)[0])


def test_a_sweep_its_table_and_its_pictures(latent_pipeline, attempt, tmp_path):
    found = attempt(latent_pipeline, guidance_scale=[1, 2.5], class_column="label", pictures=9, neighbours=3)
    rows = found["pipelines"]
    assert [row["guidance_scale"] for row in rows] == [1, 2.5]
    assert all(row["kind"] == "VQGANLatentDiffusionPipeline" and row["num_images"] == 12 for row in rows)
    (key,) = [name for name in rows[0] if name.startswith("fd_")]
    assert rows[0][key] == found[key] != rows[1][key] and found["held_out"][key] < rows[0][key]
    assert not any("fid" in name or "kid" in name for name in rows[0])  # these are not Inception's features
    table = (tmp_path / "out" / "generation.md").read_text()
    assert ", guidance 2.5 | 12 |" in table and "| real images, split test | 20 |" in table
    with Image.open(tmp_path / "out" / "samples.png") as picture:
        assert picture.width == 2 * (3 * 18 + 2) * 2 + 8  # two grids of 3 x 3 samples of 16 pixels, enlarged twice
    with Image.open(tmp_path / "out" / "neighbours.png") as picture:
        assert picture.width == 2 * (4 * (160 + 4) - 4) + 24
    assert (tmp_path / "out" / "guidance.png").is_file()


def test_noise_and_classes_are_a_sample_s_own(latent_pipeline, photos, attempt, tmp_path):
    """Whatever the batch; and a folder of samples made earlier, or an archive, is judged as its pipeline is."""
    whole = attempt(latent_pipeline, class_column="label", save_samples=True, output_dir=str(tmp_path / "a"))
    parts = attempt(latent_pipeline, class_column="label", batch_size=5, output_dir=str(tmp_path / "b"))
    assert figures_of(parts) == pytest.approx(figures_of(whole), rel=1e-4, abs=1e-6)
    (samples,) = (tmp_path / "a" / "samples").iterdir()
    stored = attempt(str(samples), output_dir=str(tmp_path / "c"))
    assert stored["kind"] == "images"
    assert figures_of(stored) == pytest.approx(figures_of(whole), rel=1e-6)
    np.savez(tmp_path / "samples.npz", read_pixels(samples).permute(0, 2, 3, 1).numpy())
    stored = attempt(str(tmp_path / "samples.npz"), output_dir=str(tmp_path / "d"))
    assert figures_of(stored) == pytest.approx(figures_of(whole), rel=1e-6)
    other = attempt(latent_pipeline, class_column="label", seed=1, output_dir=str(tmp_path / "e"))
    assert figures_of(other) != pytest.approx(figures_of(whole), rel=1e-3)


@pytest.mark.parametrize("kind", ["ddpm", "dit", "unconditional"])
def test_pipelines_of_other_classes(kind, trained_model, attempt, tmp_path):
    name = stock_pipeline(kind, tmp_path / kind, trained_model)
    found = attempt(name, class_column="label" if kind == "dit" else None)
    assert found["num_images"] == 12 and found["kind"] == {"ddpm": "DDPMPipeline", "dit": "DiTPipeline"}.get(
        kind, "VQGANLatentDiffusionPipeline"
    )
    if kind == "dit":
        return
    with pytest.raises(ValueError, match=r"guidance_scale=\[2.0\]: none of .* takes guidance"):
        attempt(name, guidance_scale=[2.0])


def test_real_images_are_close_noise_is_far_and_copies_are_found(photos, random_trunk, attempt, tmp_path):
    """In the features that stand in where Inception's weights cannot be had."""
    random = np.random.default_rng(0)
    for name in ("noise", "copies"):
        (tmp_path / name).mkdir()
    for number in range(20):
        noise = Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        noise.save(tmp_path / "noise" / f"{number:02d}.png")
        shutil.copy(Path(photos, "train", "class0", f"{number:02d}.png"), tmp_path / "copies" / f"{number:02d}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
        found = attempt(
            str(tmp_path / "noise"), str(tmp_path / "copies"), features=["auto"], resolution=32, num_samples=20,
            alex_weights_path=str(random_trunk / "alex.safetensors"),
        )  # fmt: skip
    assert list(found["protocol"]["features"]) == ["lpips_alex"] and "HF_HUB_OFFLINE" in found["skipped"]["inception"]
    (noise, copies), held_out = found["pipelines"], found["held_out"]
    assert noise["fd_lpips_alex"] > 1.3 * held_out["fd_lpips_alex"]  # of few images, most of it bias
    assert noise["kd_lpips_alex"] > 5 * abs(held_out["kd_lpips_alex"])
    assert noise["recall_lpips_alex"] == 0 < held_out["recall_lpips_alex"]
    assert copies["precision_lpips_alex"] == 1
    assert copies["memorization_ratio_lpips_alex"] < 1e-3 and noise["memorization_ratio_lpips_alex"] > 1
    assert "memorization_ratio_lpips_alex" not in held_out


def test_references_in_archives(photos, latent_pipeline, backbone, random_trunk, attempt, tmp_path):
    images = read_pixels(Path(photos, "train")).permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "images.npz", images)
    whole = attempt(latent_pipeline)
    found = attempt(latent_pipeline, dataset_name=None, reference=str(tmp_path / "images.npz"))
    expected = {name: value for name, value in figures_of(whole).items() if "memor" not in name and "near" not in name}
    assert figures_of(found) == pytest.approx(expected, rel=1e-5)
    assert not (tmp_path / "out" / "neighbours.png").exists()  # the one of the run before is gone

    np.savez(tmp_path / "moments.npz", mu=np.zeros(16), sigma=np.eye(16))
    found = attempt(latent_pipeline, dataset_name=None, reference=str(tmp_path / "moments.npz"))
    assert [name.partition("_")[0] for name in figures_of(found)] == ["num", "fd"]
    both = attempt(latent_pipeline, reference=str(tmp_path / "moments.npz"))  # statistics, and the dataset's images
    (distance,) = [name for name in figures_of(found) if name.startswith("fd_")]
    assert figures_of(both) == pytest.approx(figures_of(whole) | {distance: found[distance]}, rel=1e-6)
    with pytest.raises(ValueError, match="statistics are of one network's features"):
        networks = {"features": [backbone, "lpips_vgg"], "vgg_weights_path": str(random_trunk / "vgg.safetensors")}
        attempt(latent_pipeline, dataset_name=None, reference=str(tmp_path / "moments.npz"), **networks)
    np.savez(tmp_path / "both.npz", images, mu=np.zeros(2048), sigma=np.eye(2048))  # Inception's
    other = attempt(latent_pipeline, dataset_name=None, reference=str(tmp_path / "both.npz"))
    assert figures_of(other) == pytest.approx(expected, rel=1e-5)
    np.savez(tmp_path / "moments.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(ValueError, match="statistics of 2048 features, but these have 16. Inception's are 2048"):
        attempt(latent_pipeline, dataset_name=None, reference=str(tmp_path / "moments.npz"))
    with pytest.raises(ValueError, match="holds statistics and no images"):
        attempt(str(tmp_path / "moments.npz"))


def test_requests_that_cannot_be_met(photos, latent_pipeline, tmp_path, attempt):
    def refused(message: str, name: str = latent_pipeline, error: type = ValueError, **options) -> None:
        with pytest.raises(error, match=message):
            attempt(name, **options)

    (tmp_path / "empty").mkdir()
    refused("neither a pipeline .model_index.json. nor a folder of pictures", str(tmp_path / "empty"))
    refused("no such file or folder", "./typo", FileNotFoundError)
    photo(0).save(tmp_path / "empty" / "curves.png")
    (tmp_path / "empty" / "config.json").write_text("{}")
    refused("neither a pipeline", str(tmp_path / "empty"))  # a tokenizer's run
    refused("no split 'dev'; it has train, test", split="dev")
    refused("class_column='kind' is not a column; columns: image, label", class_column="kind")
    refused("class_balance=dataset needs --class_column", class_balance="dataset")
    refused("nothing to compare with", dataset_name=None)
    refused("two would have the name 'lpips_alex'", features=["lpips_alex", "auto"], resolution=32)
    refused("'lpips_alex' need images of 31 pixels, not 16", features=["lpips_alex"])
    refused(
        "no file at 'absent.pth'", error=FileNotFoundError, features=["inception"], inception_weights_path="absent.pth"
    )
    refused("needs class_labels to guide towards", guidance_scale=[2.0], class_balance="none")
    (tmp_path / "large").mkdir()
    photo(0, (24, 24)).save(tmp_path / "large" / "0.png")
    with pytest.raises(ValueError, match=r"samples of different sizes, \[16, 24\]: say at which --resolution"):
        attempt(latent_pipeline, str(tmp_path / "large"))
    assert not (tmp_path / "out").exists()


def test_classes_are_shared_out_exactly():
    labels = share_out([20, 12, 8, 0], 7, seed=3)
    assert sorted(labels) == [0, 0, 0, 0, 1, 1, 2] or sorted(labels) == [0, 0, 0, 1, 1, 2, 2]
    assert labels == share_out([20, 12, 8, 0], 7, seed=3) != sorted(labels)
    assert sorted(share_out([1] * 10, 30, seed=0)) == [number for number in range(10) for _ in range(3)]


def test_images_in_every_form_a_pipeline_returns():
    pixels = torch.rand(2, 3, 4, 5)
    pil = diffusers.image_processor.VaeImageProcessor.numpy_to_pil(pixels.permute(0, 2, 3, 1).numpy())
    for images in (pixels, pixels.permute(0, 2, 3, 1).numpy(), list(pixels)):
        assert torch.equal(to_uint8(images), to_uint8(pil))
    assert to_uint8(pixels[:, :1]).shape == (2, 3, 4, 5)
    with pytest.raises(ValueError, match="not finite"):
        to_uint8(pixels / 0)


def test_titles_tell_runs_apart():
    assert titles([("runs/a", 1.0), ("runs/a", 2.0), ("b/c", None)]) == ["a, guidance 1", "a, guidance 2", "c"]
    assert titles([("x/a", None), ("y/a", None)]) == ["x/a", "y/a"]
    assert titles([("a", None), ("a", None)]) == ["1: a", "2: a"]


def test_flags():
    config, names = make_parser().parse(
        ["a", "b", "--dataset_name", "c", "--guidance_scale", "1", "2.5", "--features", "inception", "d/e"]
    )
    assert names.pipelines == ["a", "b"] and config.guidance_scale == [1.0, 2.5]
    assert config.features == ["inception", "d/e"]
