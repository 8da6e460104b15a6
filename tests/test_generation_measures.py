"""How close generated images are to real ones, as arithmetic on features: as torch-fidelity, and by construction."""

import io

import numpy as np
import pytest
import torch
from conftest import smooth_pixels
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from transformers import CLIPConfig, CLIPModel, ConvNextConfig, ConvNextModel, Dinov2Config, Dinov2Model

from hf_vqgan.files.image_archives import read_image_archive
from hf_vqgan.measurement import generation
from hf_vqgan.measurement.feature_networks import LPIPSNetwork, VisionModelNetwork, feature_id
from hf_vqgan.measurement.frechet import Gaussian, frechet_distance
from hf_vqgan.measurement.generation import (
    compare_distributions,
    default_subset_size,
    kernel_distance,
    memorization_ratio,
    moments_of,
    nearest,
    precision_recall,
)


@pytest.fixture
def sets() -> tuple[torch.Tensor, torch.Tensor]:
    """Features of generated and of real images, with an offset that costs digits where it is not taken away."""
    mixing = torch.randn(24, 24, dtype=torch.float64)
    made, real = torch.randn(150, 24, dtype=torch.float64) * 1.1, torch.randn(130, 24, dtype=torch.float64)
    return made @ mixing + 20, real @ mixing + 20.2


@pytest.mark.parametrize("block", [1024, 37])
def test_measures_are_torch_fidelitys(sets, block, monkeypatch):
    monkeypatch.setattr(generation, "BLOCK", block)
    made, real = sets
    found = compare_distributions(made, real)
    statistics = [fid_features_to_statistics(features) for features in (made, real)]
    fid = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert found.frechet_distance == pytest.approx(fid, rel=1e-6) and fid > 1
    kid = kid_features_to_metric(made, real, kid_subset_size=65, verbose=False)
    assert default_subset_size(150, 130) == 65
    assert found.kernel_distance == pytest.approx(kid["kernel_inception_distance_mean"], rel=1e-6)
    assert found.kernel_distance_std == pytest.approx(kid["kernel_inception_distance_std"], rel=1e-6)
    prc = prc_features_to_metric(made, real, verbose=False)
    assert (found.precision, found.recall) == pytest.approx((prc["precision"], prc["recall"]), abs=1e-6)
    assert 0.02 < found.recall < 0.98 and 0.02 < found.precision < 0.98  # or nothing would be compared


def test_known_statistics_stand_in_for_the_images(sets):
    made, real = sets
    known = Gaussian(real.mean(dim=0), real.T.cov())
    found = compare_distributions(made, None, known)
    assert found.frechet_distance == pytest.approx(compare_distributions(made, real).frechet_distance, rel=1e-9)
    assert found.frechet_distance == pytest.approx(frechet_distance(moments_of(made), known), rel=1e-9)
    assert (found.kernel_distance, found.precision, found.recall) == (None, None, None)


def test_kernel_distance_of_one_distribution_is_zero_on_average():
    """Unbiased: no offset however few images; a biased estimate would show one of the size of its deviation."""
    draws = [kernel_distance(*torch.randn(2, 16, 3), subsets=1, subset_size=16) for _ in range(400)]
    values = torch.tensor([value for value, _ in draws])
    assert abs(values.mean()) < 4 * values.std() / 400**0.5
    assert (values < 0).double().mean() > 0.3


def clusters(numbers: list[int], each: int = 40) -> torch.Tensor:
    """Short lines of points far apart, one per number."""
    centres = torch.eye(8, dtype=torch.float64)[numbers] * 100
    spread = torch.rand(len(numbers), each, 1, dtype=torch.float64) * torch.ones(8)
    return (centres[:, None] + spread).flatten(0, 1)


@pytest.mark.parametrize(
    "modes, precision, recall",
    [([0, 1, 2, 3], 1, 1), ([0], 1, 0.25), ([0, 1, 2, 3, 4, 5, 6, 7], 0.5, 1), ([4, 5], 0, 0)],
    ids=["all", "dropped", "invented", "elsewhere"],
)
def test_dropped_modes_cost_recall_and_invented_ones_precision(modes, precision, recall):
    found = precision_recall(clusters(modes), clusters([0, 1, 2, 3]))
    assert found == pytest.approx((precision, recall), abs=0.12)  # the rims of the clusters


def test_precision_and_recall_by_hand():
    """On a line, with balls up to the nearest neighbour."""
    real = torch.tensor([[0.0], [1.0], [10.0], [13.0]])  # radii 1, 1, 3, 3: covered are [-1, 2] and [7, 16]
    made = torch.tensor([[1.5], [4.0], [7.0], [20.0]])  # radii 2.5, 2.5, 3, 13: covered are [-1, 10] and [7, 33]
    assert precision_recall(made, real, neighbours=1) == (0.5, 1.0)
    with pytest.raises(ValueError, match="4 neighbours need more images than that, and there are 4 generated"):
        precision_recall(made, real, neighbours=4)


def test_a_real_split_is_close_and_noise_far():
    """As halves of one set of images are, and noise is not."""
    made, real, other = (
        torch.randn(3, 80, 24, dtype=torch.float64) @ torch.randn(24, 24, dtype=torch.float64)
    ).unbind()
    close, far = compare_distributions(made, real), compare_distributions(5 * other + 9, real)
    assert far.frechet_distance > 20 * close.frechet_distance and far.precision < 0.1 < close.precision
    assert far.kernel_distance > 20 * abs(close.kernel_distance)


def test_nearest_is_a_search_through_all(monkeypatch):
    monkeypatch.setattr(generation, "BLOCK", 7)
    queries, references = torch.randn(30, 5), torch.randn(50, 5)
    distances, rows = nearest(queries, references, 3)
    expected = torch.cdist(queries.double(), references.double()).sort(dim=1)
    torch.testing.assert_close(distances, expected.values[:, :3])
    assert torch.equal(rows, expected.indices[:, :3])
    assert nearest(queries, references[:2], 3)[1].shape == (30, 2)


def test_copies_are_closer_than_new_images():
    train, held_out, fresh = torch.randn(3, 200, 6).unbind()
    copies = train[:100] + 1e-4 * torch.randn(100, 6)
    assert memorization_ratio(copies, held_out, train) < 0.01
    assert memorization_ratio(fresh, held_out, train) == pytest.approx(1, abs=0.2)
    assert memorization_ratio(train, train, train) == 1 and memorization_ratio(fresh, train, train) > 1e5


def test_sets_that_are_too_small():
    assert compare_distributions(torch.randn(1, 3), torch.randn(9, 3)).frechet_distance is None
    few = compare_distributions(torch.randn(3, 3), torch.randn(9, 3))
    assert few.frechet_distance is not None and few.precision is few.kernel_distance is None
    with pytest.raises(ValueError, match="subset_size=5 must be at least 2 and at most the number of images: 4 gen"):
        kernel_distance(torch.randn(4, 3), torch.randn(9, 3), subset_size=5)


# Networks


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.stack([smooth_pixels(number, 40) for number in range(3)])


def test_lpips_features_are_means_of_unit_vectors(random_trunk, pixels):
    network = LPIPSNetwork("lpips_alex", str(random_trunk / "alex.safetensors"))
    found = network(pixels)
    layers = network.network.features(((pixels / 2 + 0.5) * 255).round() / 127.5 - 1)
    expected = torch.cat([layer.mean(dim=(2, 3)) for layer in layers], dim=1) * network.dim**0.5
    torch.testing.assert_close(found.pooled, expected)
    assert found.pooled.shape == (3, network.dim) and found.logits is found.spatial is None


TINY = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32)


def dinov2():
    return Dinov2Model(Dinov2Config(**TINY, patch_size=8, mlp_ratio=2)), "pooler"


def convnext():
    return ConvNextModel(ConvNextConfig(depths=[1, 1], hidden_sizes=[8, 16], num_stages=2, image_size=32)), "pooler"


def clip():
    text = {"vocab_size": 32} | {name: value for name, value in TINY.items() if name != "image_size"}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=TINY | {"patch_size": 8}, projection_dim=8)), "pooler"


@pytest.mark.parametrize("make", [dinov2, convnext, clip], ids=lambda make: make.__name__)
def test_vision_models(make, tmp_path, pixels):
    model, pooling = make()
    model.save_pretrained(tmp_path / "Some-Model")
    network = VisionModelNetwork(str(tmp_path / "Some-Model")).train()
    assert (network.id, network.side, network.details["pooling"], network.training) == (
        "some_model",
        32,
        pooling,
        False,
    )
    shown = torch.nn.functional.interpolate(
        ((pixels / 2 + 0.5) * 255).round() / 255, (32, 32), mode="bicubic", antialias=True
    )
    shown = (shown.clamp(0, 1) - network.mean) / network.std
    with torch.no_grad():
        expected = getattr(model.eval(), "vision_model", model)(pixel_values=shown).pooler_output
    torch.testing.assert_close(network(pixels).pooled, expected.flatten(1), rtol=1e-4, atol=1e-5)


def test_a_pooler_that_was_never_trained_is_not_used(backbone, pixels):
    """ViT's head is missing from the file: transformers would draw it at random, differently each time."""
    first, second = VisionModelNetwork(backbone), VisionModelNetwork(backbone)
    assert first.details["pooling"] == "class_token"
    assert torch.equal(first(pixels).pooled, second(pixels).pooled)


def test_what_is_no_vision_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder here"):
        VisionModelNetwork("./typo")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="transformers cannot load it"):
        VisionModelNetwork(str(tmp_path / "empty"))
    assert feature_id("facebook/DINOv2-Base/") == "dinov2_base"


# Archives


def test_archives_of_images_and_statistics(tmp_path):
    images = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    mean, covariance = np.zeros(6, np.float32), np.eye(6)
    np.savez(tmp_path / "all.npz", images, mu=mean, sigma=covariance, mu_s=mean, sigma_s=covariance, other=mean)
    found = read_image_archive(tmp_path / "all.npz")
    assert (found.images == images).all()
    for moments in (found.moments, found.spatial_moments):
        assert (moments[0] == mean).all() and (moments[1] == covariance).all() and moments[0].dtype == np.float64


SLY = np.array([print, "objects"], dtype=object)


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"mu": np.zeros(3)}, "sigma is missing beside mu"),
        ({"mu_s": np.zeros(3), "sigma_s": np.zeros((3, 4))}, r"sigma_s is float64 of shape \(3, 4\); expected finite"),
        ({"mu": np.zeros(()), "sigma": np.zeros(())}, r"mu is float64 of shape \(\)"),
        ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "expected finite"),
        ({"mu": np.zeros(3, int), "sigma": np.eye(3)}, "mu is int64"),
        ({"arr_0": np.zeros((2, 3, 8, 8), np.uint8)}, r"expected images, uint8 \(N, height, width, 3\)"),
        ({"arr_0": np.zeros((2, 8, 8, 3), np.float32)}, "arr_0 is float32"),
        ({"arr_0": SLY}, "not an .npz archive of plain arrays: Object arrays cannot be loaded"),
        ({"other": np.zeros(3)}, "holds neither images"),
    ],
)
def test_other_archives_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "odd.npz", **arrays)
    with pytest.raises(ValueError, match=message) as error:
        read_image_archive(tmp_path / "odd.npz")
    assert "odd.npz" in str(error.value)


def test_other_files_are_refused(tmp_path):
    single = io.BytesIO()
    np.save(single, np.zeros(3))
    np.savez(tmp_path / "whole.npz", mu=np.zeros(99), sigma=np.eye(99))
    whole = (tmp_path / "whole.npz").read_bytes()
    for content in (b"", b"text", single.getvalue(), whole[: len(whole) // 2]):
        (tmp_path / "odd.npz").write_bytes(content)
        with pytest.raises(ValueError, match="odd.npz is not an .npz archive of plain arrays"):
            read_image_archive(tmp_path / "odd.npz")
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_image_archive(tmp_path / "absent.npz")
