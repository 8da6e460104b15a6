import copy
import subprocess
import sys

import pytest
import torch
from conftest import SPECIAL, TINY, smooth_pixels
from diffusers import VQModel
from diffusers.training_utils import EMAModel
from transformers import AutoModel

from hf_vqgan import VQGANConfig, VQGANModel
from hf_vqgan.modeling_vqgan import tile_slices


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


@pytest.mark.parametrize("kept", [0, 4, 1000, -1])
def test_damaged_weights_are_an_error_that_names_the_folder(tmp_path, tiny_model, kept):
    tiny_model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(OSError, match=f"the weights of {tmp_path} are damaged"):
        VQGANModel.from_pretrained(tmp_path)


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


@pytest.mark.parametrize("quantizer", ["vq", "residual", "fsq"])
@torch.no_grad()
def test_slicing_changes_nothing_but_memory(quantizer, pixels):
    model = VQGANModel(VQGANConfig(**TINY | {"quantizer": quantizer} | SPECIAL.get(quantizer, {}))).eval()
    whole = model(pixels)
    model.enable_slicing()
    seen = []
    model.decoder.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    sliced = model(pixels)
    assert seen == [1, 1]
    assert torch.equal(sliced.indices, whole.indices)
    torch.testing.assert_close(sliced.sample, whole.sample, atol=1e-5, rtol=0)
    model.disable_slicing()
    assert torch.equal(model(pixels).sample, whole.sample)


@torch.no_grad()
def test_tiling_of_a_local_network_is_exact():
    """Without normalisation over the image and attention, tiles agree wherever their borders are out of sight."""
    model = VQGANModel(
        VQGANConfig(**TINY | {"mid_block_add_attention": False, "down_block_types": ("DownEncoderBlock2D",) * 2,
                              "up_block_types": ("UpDecoderBlock2D",) * 2})
    ).eval()  # fmt: skip
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, torch.nn.GroupNorm):
                setattr(module, name, torch.nn.Identity())
    image = smooth_pixels(1, 96, 128)[None]
    latents = model.encode(image).latents
    whole = model.decode(latents, force_not_quantize=True).sample
    model.enable_tiling(tile_sample_min_size=48, tile_overlap_factor=0.5)
    tiled_latents = model.encode(image).latents
    tiled = model.decode(latents, force_not_quantize=True).sample
    # Zero padding at tile borders is the only difference; the blend weighs it down but not to nothing.
    assert tiled.shape == whole.shape and tiled_latents.shape == latents.shape
    assert (tiled - whole).abs().mean() < 0.02 * whole.std()
    assert (tiled_latents - latents).abs().mean() < 0.02 * latents.std()
    corner = (..., slice(0, 12), slice(0, 12))  # seen by the first tile only, far from its inner borders
    torch.testing.assert_close(tiled[corner], whole[corner], atol=1e-5, rtol=0)


def seam_ratio(difference: torch.Tensor, positions: list[int]) -> float:
    """Steps of an error map `(B, C, H, W)` from column to column: the largest at seams over the mean of all."""
    steps = difference.diff(dim=3).abs().mean(dim=(0, 1, 2))
    return float(max(steps[position - 1] for position in positions) / steps.mean())


@pytest.mark.parametrize(
    "fields",
    [{}, {"norm_type": "spatial", "vq_embed_dim": 8, "block_out_channels": (32, 32)}],
    ids=["group", "spatial"],
)
@torch.no_grad()
def test_tiles_without_overlap_show_seams_that_blending_removes(trained_model, fields):
    model = trained_model
    if fields:
        model = VQGANModel(VQGANConfig(**TINY | fields)).eval()
    model = copy.deepcopy(model)
    image = smooth_pixels(7, 64, 128)[None]
    latents = model.encode(image).latents
    whole = model.decode(latents).sample

    def tiled(overlap):
        model.enable_tiling(tile_sample_min_size=32, tile_overlap_factor=overlap)
        return model.decode(latents).sample

    butted, blended = tiled(0.0) - whole, tiled(0.25) - whole
    starts = [part.start * 2 for part in tile_slices(64, 16, 4)][1:]
    assert starts == [24, 48, 72, 96]
    assert seam_ratio(butted, [32, 64, 96]) > 2
    assert seam_ratio(blended, starts) < 1.8
    assert blended.abs().mean() < butted.abs().mean() < whole.std()
    model.disable_tiling()
    assert torch.equal(model.decode(latents).sample, whole)


@torch.no_grad()
def test_tiled_encoding_stays_near_untiled(trained_model):
    model = copy.deepcopy(trained_model)
    image = smooth_pixels(8, 64, 96)[None]
    indices, latents = model.encode_indices(image), model.encode(image).latents
    model.enable_tiling(tile_sample_min_size=32, tile_overlap_factor=0.5)
    # A tile's GroupNorm statistics move latents, and many to a neighbouring code; by chance 1 of 64 would agree. (The
    # fixture is trained: rounding decides whether it is 0.24 or 0.3.)
    assert (model.encode_indices(image) == indices).float().mean() > 0.15
    assert (model.encode(image).latents - latents).abs().mean() < 0.3 * latents.std()
    assert model(image).sample.shape == image.shape
    small = image[..., :32, :32]
    assert torch.equal(model.encode(small).latents, trained_model.encode(small).latents)


def test_tiles_cover_a_side_exactly():
    for side, tile, overlap in ((64, 16, 4), (17, 16, 4), (16, 16, 4), (5, 16, 4), (33, 8, 0), (9, 2, 1)):
        parts = tile_slices(side, tile, overlap)
        assert parts[0].start == 0 and parts[-1].stop == side
        assert {part.stop - part.start for part in parts} == {min(side, tile)}
        assert all(a.stop - b.start >= overlap for a, b in zip(parts, parts[1:], strict=False))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"tile_sample_min_size": 15}, "tile_sample_min_size=15 must be a positive multiple of 2"),
        ({"tile_overlap_factor": 1.0}, r"tile_overlap_factor=1.0 must be in \[0, 1\)"),
    ],
)
def test_bad_tiles(tiny_model, fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_model.enable_tiling(**fields)


def test_saved_weights_are_as_readable_as_other_files(tmp_path, tiny_model):
    """safetensors writes them for their owner alone, which breaks shared folders."""
    tiny_model.save_pretrained(tmp_path, max_shard_size="20KB")
    modes = {file.stat().st_mode for file in tmp_path.iterdir()}
    assert len(modes) == 1 and len(list(tmp_path.glob("*.safetensors"))) > 1


def test_moving_average_of_diffusers(tmp_path, tiny_model):
    average = EMAModel(tiny_model.parameters(), decay=0.75, model_cls=VQGANModel, model_config=tiny_model.config)
    with torch.no_grad():
        tiny_model.decoder.conv_out.bias.add_(1)
    average.step(tiny_model.parameters())
    average.save_pretrained(tmp_path)
    again = EMAModel.from_pretrained(tmp_path, VQGANModel)
    assert (again.decay, again.optimization_step) == (0.75, 1)
    assert all(map(torch.equal, again.shadow_params, average.shadow_params))
    assert not hasattr(tiny_model.config, "_ema")


def test_nothing_and_nan_are_errors(tiny_model):
    for shape in ((0, 3, 16, 16), (1, 3, 0, 16)):
        with pytest.raises(ValueError, match="hold no pixels"):
            tiny_model.encode_indices(torch.zeros(shape))
    with pytest.raises(ValueError, match="hold no codes"):
        tiny_model.decode_indices(torch.zeros(0, 8, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="latent values are NaN or infinite. Check the input image"):
        tiny_model.eval().encode_indices(torch.full((1, 3, 16, 16), torch.nan))
