import subprocess
import sys

import pytest
import torch
from diffusers import VQModel
from transformers import AutoModel

from hf_vqgan import VQGANConfig, VQGANModel


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
def test_shapes_and_ranges(tiny_model, pixels):
    output = tiny_model(pixels)
    assert output.sample.shape == pixels.shape
    assert output.latents.shape == (2, 4, 8, 12)
    assert output.indices.shape == (2, 8, 12) and output.indices.dtype == torch.int64
    assert set(output.losses) == {"commitment", "codebook"}
    assert torch.equal(tiny_model.encode(pixels).latents, output.latents)
    assert torch.equal(tiny_model.encode(pixels).latent_dist.sample(), output.latents)


@torch.no_grad()
def test_every_way_to_decode_agrees(tiny_model, pixels):
    sample = tiny_model(pixels).sample
    latents = tiny_model.encode(pixels).latents
    chosen = tiny_model.quantize(latents)
    indices = tiny_model.encode_indices(pixels)
    assert len(indices.unique()) > 1
    assert torch.equal(indices, chosen.indices)
    for decoded in (
        tiny_model.decode(latents),
        tiny_model.decode(chosen.quantized, force_not_quantize=True),
        tiny_model.decode_indices(indices),
        tiny_model.decode_indices(indices.int()),
        tiny_model.decode(indices.flatten(), force_not_quantize=True, shape=(2, 8, 12, 4)),
    ):
        assert torch.equal(decoded.sample, sample)


@torch.no_grad()
def test_unquantized_forward(tiny_model, pixels):
    output = tiny_model(pixels, force_not_quantize=True)
    assert torch.equal(output.sample, tiny_model.decode(output.latents, force_not_quantize=True).sample)
    assert not torch.equal(output.sample, tiny_model(pixels).sample)


def test_save_and_load_is_exact(tmp_path, tiny_model, pixels):
    tiny_model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded = VQGANModel.from_pretrained(tmp_path)
    assert same_weights(loaded, tiny_model)
    assert torch.equal(loaded(pixels).sample, tiny_model(pixels).sample)
    assert not loaded.training


def test_missing_weights_are_initialised_as_new_ones(tmp_path, tiny_model):
    """A checkpoint without some tensor must not leave uninitialised memory behind."""
    weights = tiny_model.state_dict()
    del weights["quantize.embedding.weight"], weights["decoder.conv_out.weight"]
    tiny_model.save_pretrained(tmp_path, state_dict=weights)
    loaded = VQGANModel.from_pretrained(tmp_path)
    assert loaded.quantize.embedding.weight.abs().max() <= 1 / 16
    bound = (8 * 9) ** -0.5
    assert 0.5 * bound < loaded.decoder.conv_out.weight.abs().max() <= bound
    assert torch.equal(loaded.encoder.conv_in.weight, tiny_model.encoder.conv_in.weight)


def test_fresh_weights_follow_pytorch_defaults():
    """transformers would draw every weight from N(0, 0.02); diffusers' blocks expect PyTorch's fan-in scale."""
    weight = VQGANModel(VQGANConfig(block_out_channels=(32, 64), latent_channels=16)).encoder.conv_in.weight
    assert abs(weight.std() - (3 * 3 * 9) ** -0.5) < 0.02


def test_auto_classes_in_a_fresh_process(tmp_path, tiny_model):
    tiny_model.save_pretrained(tmp_path)
    code = (
        "import hf_vqgan, transformers, sys;"
        "print(type(transformers.AutoModel.from_pretrained(sys.argv[1])).__name__,"
        "type(transformers.AutoConfig.from_pretrained(sys.argv[1])).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.split() == ["VQGANModel", "VQGANConfig"], done.stderr


@pytest.mark.parametrize("norm_type", ["group", "spatial"])
@torch.no_grad()
def test_diffusers_export_has_the_same_outputs(tmp_path, norm_type, pixels):
    fields = dict(block_out_channels=(32, 64), layers_per_block=1, latent_channels=8, vq_embed_dim=8)
    model = VQGANModel(VQGANConfig(**fields, num_vq_embeddings=16, norm_type=norm_type)).eval()
    torch.nn.init.normal_(model.quantize.embedding.weight, std=0.5)
    model.to_diffusers().save_pretrained(tmp_path)
    exported = VQModel.from_pretrained(tmp_path).eval()
    assert torch.equal(exported.encode(pixels).latents, model.encode(pixels).latents)
    # diffusers' straight-through z + (e - z) rounds the codes, hence not to the last bit
    torch.testing.assert_close(exported(pixels).sample, model(pixels).sample, atol=1e-4, rtol=0)


def test_auto_model_from_config(tiny_config):
    assert isinstance(AutoModel.from_config(tiny_config), VQGANModel)


@torch.no_grad()
def test_half_precision(tmp_path, tiny_model, pixels):
    tiny_model.save_pretrained(tmp_path)
    model = VQGANModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    output = model(pixels)
    assert output.sample.dtype == torch.bfloat16
    assert model.decode(output.latents.float()).sample.dtype == torch.bfloat16
    assert (output.indices == tiny_model(pixels).indices).float().mean() > 0.8


def test_gradient_checkpointing_changes_no_gradient(tiny_model, pixels):
    tiny_model.train()

    def gradients():
        tiny_model.zero_grad()
        output = tiny_model(pixels)
        (output.sample.square().mean() + sum(output.losses.values())).backward()
        return [p.grad.clone() for p in tiny_model.parameters()]

    plain = gradients()
    # transformers renames gradient checkpointing
    getattr(tiny_model, "activation_checkpointing_enable", tiny_model.gradient_checkpointing_enable)()
    for a, b in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m, x: m.encode(x[..., :-1]), "16x23 is not a multiple of 2"),
        (lambda m, x: m.encode(x[:, :1]), r"expected \(B, 3, H, W\)"),
        (lambda m, x: m.encode((x * 127).to(torch.uint8)), "torch.uint8: expected floats"),
        (lambda m, x: m.decode_indices(torch.full((1, 2, 2), 16)), r"span \[16, 16\].*codes 0 to 15"),
        (lambda m, x: m.decode_indices(torch.zeros(4, dtype=torch.int64)), r"expected \(B, h, w\)"),
    ],
)
def test_bad_input(tiny_model, pixels, call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny_model, pixels)


def test_unknown_quantizer_lists_the_known_ones():
    with pytest.raises(ValueError, match="quantizer='vqvq' is not one of .*'vq'"):
        VQGANModel(VQGANConfig(quantizer="vqvq"))
