import hashlib
import pickle

import numpy as np
import pytest
import torch
from conftest import package_lpips
from safetensors.torch import load_file

from hf_vqgan.losses import lpips_weights
from hf_vqgan.losses.image_losses import (
    LPIPS,
    adaptive_weight,
    adversarial_loss,
    discriminator_losses,
    last_layer_gradient,
    ramp,
    weighted_sum,
)
from hf_vqgan.losses.lpips_weights import NETWORKS, ArrayUnpickler, load_trunk_weights


@pytest.mark.parametrize("net", sorted(NETWORKS))
@pytest.mark.filterwarnings("ignore::UserWarning")  # torchvision's, about how lpips builds its networks
def test_distance_equals_the_lpips_package(net, random_trunk):
    ours = LPIPS(net, str(random_trunk / f"{net}.safetensors"))
    theirs = package_lpips(ours)
    x, y = torch.rand(2, 2, 3, 64, 64) * 2 - 1
    torch.testing.assert_close(ours(x, y), theirs(x, y).flatten())


def test_lpips_is_frozen_and_deaf_to_train(random_trunk):
    perceptual = LPIPS("alex", str(random_trunk / "alex.safetensors")).train()
    assert not perceptual.training and not any(p.requires_grad for p in perceptual.parameters())
    x = torch.rand(1, 3, 64, 64, requires_grad=True)
    y = torch.rand(1, 3, 64, 64, requires_grad=True)
    perceptual(x, y).sum().backward()
    assert x.grad.abs().sum() > 0 and y.grad is None
    assert perceptual(y, y).item() == 0


def test_trunk_weights_that_do_not_fit(tmp_path, random_trunk):
    with pytest.raises(ValueError, match="not the weights of torchvision's alexnet: features.0.weight"):
        load_trunk_weights("alex", str(random_trunk / "vgg.safetensors"))
    with pytest.raises(FileNotFoundError, match="no file at '/nowhere'"):
        load_trunk_weights("alex", "/nowhere")


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda file: file.write_bytes(file.read_bytes()[:5000]), "is damaged, incomplete or no checkpoint"),
        (lambda file: file.write_bytes(b""), "is damaged, incomplete or no checkpoint"),
        (lambda file: torch.save({"features": hashlib.sha256}, file), r"its pickle calls for _hashlib\.openssl_sha256"),
        (lambda file: torch.save([1], file), "holds a list, not a state dict"),
        (lambda file: torch.save({"a": 1}, file), "holds no state dict: 'a' are not tensors"),
        (lambda file: torch.save({"features.0.weight": torch.zeros(64, 3, 11, 11).int()}, file), "is torch.int32 or"),
        (lambda file: torch.save({"features.0.weight": torch.full((64, 3, 11, 11), torch.nan)}, file), "holds NaN"),
    ],
)
def test_weights_that_are_none_are_refused(spoil, message, tmp_path, random_trunk):
    file = tmp_path / "alexnet.pth"
    torch.save(load_file(random_trunk / "alex.safetensors"), file)
    spoil(file)
    with pytest.raises(ValueError, match=message):
        load_trunk_weights("alex", str(file))


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(lpips_weights.constants, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(lpips_weights.torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    return tmp_path / "hf_vqgan" / "lpips-alex.safetensors"


def test_without_any_source_the_error_says_what_to_do(empty_cache, monkeypatch):
    monkeypatch.setattr(lpips_weights.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        FileNotFoundError, match="(?s)--perceptual_weights_path.*--perceptual_weight 0.*--validation_net"
    ):
        load_trunk_weights("alex")
    assert not empty_cache.exists()


def test_cached_weights_are_checked(empty_cache, random_trunk, monkeypatch):
    source = load_file(random_trunk / "alex.safetensors")
    monkeypatch.setattr(lpips_weights, "_from_torchvision", lambda network: source)
    fetched = load_trunk_weights("alex")
    monkeypatch.delattr(lpips_weights, "_from_torchvision")  # from here on, only the cache can answer
    assert all(torch.equal(tensor, fetched[name]) for name, tensor in load_trunk_weights("alex").items())
    data = bytearray(empty_cache.read_bytes())
    data[-1] ^= 1
    empty_cache.write_bytes(data)
    with pytest.raises(ValueError, match="damaged.*Delete it"):
        load_trunk_weights("alex")
    empty_cache.write_bytes(data[:1000])
    with pytest.raises(ValueError, match="cannot be read.*Delete it"):
        load_trunk_weights("alex")


def test_pickles_with_anything_but_arrays_are_refused(tmp_path):
    arrays = {"Conv_0": {"kernel": np.arange(6.0).reshape(2, 3)}}
    file = tmp_path / "arrays.pkl"
    # The archive names numpy's old module path, which today's numpy writes differently.
    file.write_bytes(pickle.dumps(arrays, protocol=3).replace(b"numpy._core.", b"numpy.core."))
    with open(file, "rb") as stream:
        assert np.array_equal(ArrayUnpickler(stream).load()["Conv_0"]["kernel"], arrays["Conv_0"]["kernel"])
    file.write_bytes(pickle.dumps(hashlib.sha256))
    with open(file, "rb") as stream, pytest.raises(pickle.UnpicklingError, match="refused to load _hashlib"):
        ArrayUnpickler(stream).load()


# ------------------------------------------------------------------------------------------------ closed forms


def test_weighted_sum_is_strict():
    terms = {"l1": torch.tensor(2.0), "l2": torch.tensor(3.0)}
    assert weighted_sum(terms, {"l1": 0.5, "l2": 0.0, "perceptual": 0.0}) == 1
    with pytest.raises(KeyError, match="weighted but not computed: .*perceptual"):
        weighted_sum(terms, {"l1": 1, "l2": 1, "perceptual": 1})
    with pytest.raises(KeyError, match="without a weight: .*l2"):
        weighted_sum(terms, {"l1": 1})


def test_adversarial_losses():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0])
    assert adversarial_loss(fake, "hinge") == 1
    assert discriminator_losses(real, fake, "hinge") == {"disc_real": 0.5, "disc_fake": 1.0}
    log2 = torch.tensor(2.0).log()
    zero = torch.zeros(3)
    assert torch.isclose(adversarial_loss(zero, "non_saturating"), log2)
    torch.testing.assert_close(
        discriminator_losses(zero, zero, "non_saturating"), {"disc_real": log2, "disc_fake": log2}
    )


def test_adaptive_weight():
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])
    torch.testing.assert_close(adaptive_weight(a, b, 1e4), torch.tensor(5 / 2.0001))
    assert adaptive_weight(a, b, 1.5) == 1.5
    assert adaptive_weight(a, torch.zeros(2), 1e4) == 0  # taming's would sit at its cap


def test_last_layer_gradient_is_autograds():
    conv = torch.nn.Conv2d(4, 3, 3, padding=1).double()
    hidden = torch.randn(2, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    sample = conv(hidden.tanh())
    loss = (sample**3).mean()
    (expected,) = torch.autograd.grad(loss, conv.weight, retain_graph=True)
    (at_sample,) = torch.autograd.grad(loss, sample, retain_graph=True)
    torch.testing.assert_close(last_layer_gradient(sample, conv.weight, at_sample), expected)


def test_ramp():
    assert [ramp(step, 10, 4) for step in (0, 9, 10, 11, 14, 99)] == [0, 0, 0, 0.25, 1, 1]
    assert [ramp(step, 10, 0) for step in (9, 10)] == [0, 1]
