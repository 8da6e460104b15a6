"""Published checkpoints: the same codes and pixels as the original, both ways, or one clear error.

Two kinds of originals: small files written by the original projects' own code, in a folder beside the repository or in
`HF_VQGAN_GOLDENS`; and the stand-ins of `original_models.py`, which need nothing.
"""

import argparse
import collections
import datetime
import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from conftest import TINY
from diffusers import VQModel
from original_models import Original, OriginalLlamaGen
from safetensors.torch import load_file, save_file

from hf_vqgan import VQGANConfig, VQGANModel
from hf_vqgan.conversion import convert as convert_module
from hf_vqgan.conversion.convert import EXPORTS, FAMILIES, convert
from hf_vqgan.files.checkpoint_files import read_checkpoint

ROOT = Path(__file__).parents[1]
GOLDENS = Path(os.environ.get("HF_VQGAN_GOLDENS", ROOT.parent / "shared" / "goldens"))
GOLDEN_NAMES = (
    "chameleon-vq", "diffusers-vqmodel", "emu35-ibq", "ibq", "janus-vq", "ldm-vq", "llamagen", "maskgit-vqgan", "movq",
    "movq-openmuse", "openmuse-vqgan", "taming-gumbel", "taming-vqgan",
)  # fmt: skip
REFUSED_GOLDENS = {
    "infinity-bsq": "the multi-scale tokenizer of Infinity",
    "open-magvit2": "Open-MAGVIT2 of SEED-Voken",
    "rqvae": "RQ-VAE",
    "showo-magvitv2": "MAGVITv2 of Show-o",
    "var-vqvae": "a multi-scale VQVAE of VAR",
}


def golden(name: str) -> Path:
    folder = GOLDENS / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; HF_VQGAN_GOLDENS can name the folder of golden checkpoints")
    return folder


@torch.no_grad()
def outputs(model: VQGANModel, pixels: torch.Tensor, unit_range: bool) -> dict[str, torch.Tensor]:
    """What `Original.run` returns, for pixels in the original's range."""
    pixels = pixels * 2 - 1 if unit_range else pixels
    latents = model.encode(pixels).latents
    chosen = model.quantize(latents)
    result = {"latents": latents, "indices": chosen.indices, "quantized": chosen.quantized}
    if not model.config.encoder_only:
        result["reconstruction"] = model(pixels).sample
        result["decode_from_indices"] = model.decode_indices(chosen.indices).sample
        if unit_range:
            for name in ("reconstruction", "decode_from_indices"):
                result[name] = (result[name] + 1) / 2
    return result


def assert_same(actual: dict, expected: dict, tolerance: float = 1e-5) -> None:
    """
    Equal codes; all else within `tolerance` of the largest value.

    1e-5 is float32's own noise. Against what the golden files' weights give in float64, the originals' stored outputs
    are up to 8e-6 off, for movq (values up to 6.7) 2.4e-5, and ours in float32 up to 1.1e-5, for movq 1.3e-5. Doing
    attention in the originals' order of operations changes nothing about that. That the formulas are equal, and not
    only close, is what `test_stand_in` sees in float64.
    """
    assert torch.equal(actual["indices"], expected["indices"])
    for name in actual.keys() - {"indices"}:
        bound = tolerance * max(1.0, expected[name].abs().max().item())
        torch.testing.assert_close(actual[name], expected[name], atol=bound, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("weights", ["auto", "raw"])
@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_golden(name, weights, tmp_path):
    folder = golden(name)
    expected = load_file(folder / "io.safetensors")
    pixels = expected["pixel_values"]
    unit_range = json.loads((folder / "meta.json").read_text())["value_range"] == [0.0, 1.0]
    if weights == "raw" and "raw.indices" in expected:
        expected = {key.removeprefix("raw."): value for key, value in expected.items() if key.startswith("raw.")}
    model = VQGANModel.from_original(folder, weights=weights)
    assert not model.training and model.config.pixel_range == ((0, 1) if unit_range else (-1, 1))
    result = outputs(model, pixels, unit_range)
    assert_same(result, expected)

    model.save_pretrained(tmp_path)
    again = VQGANModel.from_pretrained(tmp_path)
    # Not equal to the bit: where tensors lie in memory decides on the kernels.
    assert_same(outputs(again, pixels, unit_range), result)
    weights, kept = model.state_dict(), again.state_dict()
    assert kept.keys() == weights.keys() and all(torch.equal(kept[key], weights[key]) for key in kept)


@pytest.mark.parametrize(
    "key, title",
    [
        ("quantize.quant_resi.qresi_ls.0.weight", "a multi-scale VQVAE of VAR"),
        ("quantizer.lfq.mask", "the multi-scale tokenizer of Infinity"),
        ("encoder.conv_in.conv.weight", "the multi-scale tokenizer of Infinity"),
        ("quantizer.codebooks.0.weight", "RQ-VAE"),
        ("decoder.adaptive.0.gamma.weight", "Open-MAGVIT2 of SEED-Voken"),
        ("quantize.power_vals", "MAGVITv2 of Show-o"),
    ],
)
def test_another_kind_is_refused_by_name(key, title, tmp_path):
    folder = save_original(Original(), tmp_path, TAMING_TARGET, "state_dict", **{key: torch.zeros(1)})
    for format in ("auto", "taming"):
        with pytest.raises(ValueError, match=f"is {title}, which this package does not read: "):
            VQGANModel.from_original(folder, format)


@pytest.mark.parametrize("format", ["auto", "taming", "ibq"])
@pytest.mark.parametrize("name", REFUSED_GOLDENS)
def test_golden_of_another_kind_is_refused(name, format):
    """Their keys resemble those of families that are read; none must be taken for one."""
    folder = golden(name)
    file = folder / json.loads((folder / "meta.json").read_text())["checkpoint"]
    for config in (None, {}):
        with pytest.raises(ValueError, match=f"is {REFUSED_GOLDENS[name]}, which this package does not read: "):
            VQGANModel.from_original(file, format, config)


@pytest.mark.parametrize(
    "name, format",
    [
        ("taming-vqgan", "taming"),
        ("taming-gumbel", "taming"),
        ("ldm-vq", "ldm"),
        ("llamagen", "llamagen"),
        ("diffusers-vqmodel", "diffusers"),
    ],
)
def test_golden_round_trip(name, format):
    folder = golden(name)
    meta = json.loads((folder / "meta.json").read_text())
    stored = read_checkpoint(folder / meta["checkpoint"])
    model = VQGANModel.from_original(folder)
    tensors, config = model.to_original(format)
    extra = {key for key in stored.shapes if re.match(r"loss\.|quantize\.codebook_used", key)}
    assert tensors.keys() == stored.shapes.keys() - extra
    assert all(torch.equal(tensor, stored.load(key)) for key, tensor in tensors.items())
    if name != "taming-gumbel":  # its lossconfig and schedule are not the model's
        told = json.loads(json.dumps(meta["config_values"]))
        for key, value in _flat(config).items():
            if key not in ("target", "_diffusers_version", "lookup_from_codebook"):
                assert value == _flat(told).get(key, value), key


def _flat(config: dict) -> dict:
    flat = {}
    for key, value in config.items():
        if key != "lossconfig":
            flat |= _flat(value) if isinstance(value, dict) else {key: list(value) if type(value) is tuple else value}
    return flat


# Family: (class, options, config file, container). Sizes and options unlike the goldens'.
TAMING_TARGET = {"model": {"target": "taming.models.vqgan.VQModel", "params": {"ddconfig": {"resolution": 16}}}}
STAND_INS = {
    "taming": (Original, {}, TAMING_TARGET, "state_dict"),
    "taming-attention-everywhere": (Original, {"attention": (0, 1, 2), "layers": 2}, TAMING_TARGET, "state_dict"),
    "taming-wide-stem": (Original, {"mult": (2, 1, 3), "attention": (1,)}, TAMING_TARGET, "state_dict"),
    "taming-one-level": (Original, {"mult": (1,), "attention": ()}, TAMING_TARGET, "state_dict"),
    "taming-grey": (Original, {"channels": 1, "z": 3, "dim": 8}, TAMING_TARGET, "state_dict"),
    "taming-gumbel": (Original, {"choice": "gumbel", "z": 5, "dim": 5}, TAMING_TARGET, "state_dict"),
    "ldm": (Original, {"mult": (1, 2, 4), "z": 3, "dim": 3, "attention": ()}, {}, "state_dict"),
    "ldm-noattn": (Original, {"mid_attention": False, "attention": ()}, {}, "state_dict"),
    "ibq": (
        Original, {"choice": "product", "codes": 40}, {"model": {"class_path": "src.IBQ.models.ibqgan.IBQ",
        "init_args": {"n_embed": 40}}}, "state_dict",
    ),
    "openmuse": (Original, {"never_runs_single": True, "attention": (0,)}, {"_class_name": "VQGANModel"}, None),
    "openmuse-noattn": (
        Original, {"attention": (), "mid_attention": False, "layers": 2}, {"_class_name": "VQGANModel"}, None,
    ),
    "maskgit": (Original, {"maskgit": True, "attention": (), "z": 6, "dim": 6, "layers": 2}, {}, None),
    "maskgit-wide-stem": (
        Original, {"maskgit": True, "attention": (), "z": 4, "mult": (2, 1, 1, 2)}, {}, None,
    ),
    "movq": (Original, {"spatial": True, "attention": (1, 2)}, {}, None),
    "openmuse_movq": (
        Original, {"spatial": True, "attention": (1,), "linear_attention": True, "never_runs_single": True}, {}, None,
    ),
    "openmuse_movq-two-layers": (
        Original, {"spatial": True, "linear_attention": True, "never_runs_single": True, "layers": 2},
        {"_class_name": "MOVQ"}, None,
    ),
    "janus": (Original, {"lowest_first": True, "normalizes_lookup": True}, {}, None),
    "chameleon": (Original, {"decoder": False, "attention": (1,)}, {}, None),
    "llamagen": (OriginalLlamaGen, {"choice": "sphere", "lowest_first": True, "layers": 2}, {}, "model"),
    "llamagen-raw-codes": (
        OriginalLlamaGen, {"lowest_first": True, "mult": (1, 2, 2, 1), "attention": (3,)},
        {"codebook_l2_norm": False}, "model",
    ),
}  # fmt: skip


def save_original(original: Original, folder: Path, config: dict, container: str | None, **extra) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = original.state_dict() | extra
    if container:
        torch.save({container: tensors, "epoch": 3}, folder / "model.ckpt")
    else:
        save_file(tensors, folder / "model.safetensors")
    if config:
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(params=STAND_INS)
def stand_in(request, tmp_path):
    kind, options, config, container = STAND_INS[request.param]
    original = kind(**options)
    return original, save_original(original, tmp_path / "original", config, container), request.param


def images(original: Original, unit_range: bool = False) -> torch.Tensor:
    pixels = torch.rand(2, original.encoder.conv_in.in_channels, 16, 24)
    return pixels if unit_range else pixels * 2 - 1


def test_stand_in(stand_in):
    original, folder, name = stand_in
    unit_range = name.startswith(("openmuse", "maskgit"))
    pixels = images(original, unit_range).double()
    expected = original.double().run(pixels)
    assert len(expected["indices"].unique()) > 2
    model = VQGANModel.from_original(folder).double()
    result = outputs(model, pixels, unit_range)
    assert result.keys() == expected.keys()
    assert_same(result, expected, tolerance=1e-12)


def test_stand_ins_differ_where_their_rules_do():
    """Each quirk changes the result; otherwise the test above could not see it."""
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1

    def run(**options):
        torch.manual_seed(0)
        return Original(**options).run(pixels)

    usual = run()
    for choice in ("sphere", "product"):
        assert not torch.equal(run(choice=choice)["indices"], usual["indices"])
    looked_up = run(normalizes_lookup=True)
    assert not torch.allclose(looked_up["decode_from_indices"], looked_up["reconstruction"])
    assert not torch.allclose(
        run(attention=(2,), never_runs_single=True)["latents"], run(attention=(2,))["latents"], atol=1e-3
    )


@pytest.mark.parametrize(
    "name, format",
    [
        ("taming-wide-stem", "taming"),
        ("taming-attention-everywhere", "taming"),
        ("taming-gumbel", "taming"),
        ("ldm-noattn", "ldm"),
        ("ldm", "ldm"),
        ("llamagen", "llamagen"),
        ("llamagen-raw-codes", "llamagen"),
    ],
)
def test_round_trip_is_the_identity(name, format, tmp_path):
    kind, options, config, container = STAND_INS[name]
    original = kind(**options)
    model = VQGANModel.from_original(save_original(original, tmp_path / "first", config, container))
    tensors, exported_config = model.to_original(format)
    assert tensors.keys() == original.state_dict().keys()
    assert all(torch.equal(tensors[key], tensor) for key, tensor in original.state_dict().items())

    # and the exported config describes the exported tensors: the importer holds the two against each other
    convert(tmp_path / "first", tmp_path / "second", to=format)
    again = VQGANModel.from_original(tmp_path / "second")
    assert again.config.to_dict() == model.config.to_dict() | {"sample_size": again.config.sample_size}
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("norm_type", ["group", "spatial"])
@pytest.mark.parametrize("old_names", [False, True])
def test_diffusers(norm_type, old_names, tmp_path):
    fields = {"norm_num_groups": 16, "latent_channels": 4, "num_vq_embeddings": 24, "scaling_factor": 0.5}
    theirs = VQModel(
        block_out_channels=(32, 64), down_block_types=("AttnDownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "AttnUpDecoderBlock2D"), norm_type=norm_type, layers_per_block=2, **fields,
    ).eval()  # fmt: skip
    torch.nn.init.normal_(theirs.quantize.embedding.weight)
    theirs.save_pretrained(tmp_path)
    if old_names:
        file = tmp_path / "diffusion_pytorch_model.safetensors"
        renames = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        pattern = re.compile("|".join(map(re.escape, renames)))
        save_file({pattern.sub(lambda m: renames[m[0]], key): value for key, value in load_file(file).items()}, file)
    model = VQGANModel.from_original(tmp_path)
    assert {name: getattr(model.config, name) for name in fields} == fields
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        assert torch.equal(model.encode(pixels).latents, theirs.encode(pixels).latents)
        torch.testing.assert_close(model(pixels).sample, theirs(pixels).sample, atol=1e-4, rtol=0)
    tensors, config = model.to_original("diffusers")
    assert all(torch.equal(tensors[key], tensor) for key, tensor in theirs.state_dict().items())
    assert {name: config[name] for name in fields} == fields

    convert(tmp_path, tmp_path / "out", to="diffusers")
    exported = VQModel.from_pretrained(tmp_path / "out")
    assert all(torch.equal(exported.state_dict()[key], tensor) for key, tensor in theirs.state_dict().items())


def test_diffusers_in_parts_and_without_config(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(convert_module.logger, "warning", said.append)
    theirs = VQModel(block_out_channels=(32,))
    theirs.save_pretrained(tmp_path, safe_serialization=False, max_shard_size="30KB")
    assert (tmp_path / "diffusion_pytorch_model.bin.index.json").exists()
    model = VQGANModel.from_original(tmp_path)
    assert all(torch.equal(tensor, theirs.state_dict()[key]) for key, tensor in model.state_dict().items())
    assert said == []
    (tmp_path / "config.json").unlink()
    VQGANModel.from_original(tmp_path)
    assert len(said) == 1 and "norm_num_groups: taken as 32; act_fn: taken as silu" in said[0]


def flat_shadow(tensors: dict, prefix: str = "model_ema.") -> dict:
    return {prefix + key.replace(".", ""): tensor + 1 for key, tensor in tensors.items()}


def test_moving_averages(tmp_path):
    original = Original()
    tensors = original.state_dict()

    def stem(path, **options):
        return VQGANModel.from_original(path, **options).encoder.conv_in.weight

    raw = tensors["encoder.conv_in.weight"]
    shadows = flat_shadow(tensors) | {"model_ema.decay": torch.tensor(0.999)}
    for updates, format, average_by_default in ((-1, "ibq", True), (7, "ldm", False)):
        extra = shadows | {"model_ema.num_updates": torch.tensor(updates, dtype=torch.int32)}
        folder = save_original(original, tmp_path / format, {}, "state_dict", **extra)
        for options in ({}, {"format": format}):  # told by the count of updates alone, or by name
            assert torch.equal(stem(folder, **options), raw + average_by_default)
        assert torch.equal(stem(folder, weights="ema"), raw + 1)
        assert torch.equal(stem(folder, weights="raw"), raw)

    spatial = Original(spatial=True)
    tensors = spatial.state_dict()
    extra = {}
    for module in ("encoder", "decoder", "quantize", "quant_conv", "post_quant_conv"):
        part = {key.split(".", 1)[1]: value for key, value in tensors.items() if key.startswith(f"{module}.")}
        extra |= flat_shadow(part, f"ema_{module}.")
    # of weights alone: what is not trained has none
    extra |= {"quantize.used": torch.arange(3)}
    folder = save_original(spatial, tmp_path / "movq", {}, "state_dict", **extra)
    raw = tensors["encoder.conv_in.weight"]
    assert torch.equal(stem(folder), raw) and torch.equal(stem(folder, weights="ema"), raw + 1)

    llamagen = OriginalLlamaGen(lowest_first=True)
    tensors = llamagen.state_dict() | {"quantize.codebook_used": torch.zeros(65536)}
    raw = tensors["encoder.conv_in.weight"]
    training = {"model": tensors, "ema": {key: value + 1 for key, value in tensors.items()}}
    torch.save(training | {"args": argparse.Namespace(lr=1), "optimizer": {}, "steps": 3}, tmp_path / "training.pt")
    assert torch.equal(stem(tmp_path / "training.pt"), raw + 1)
    assert torch.equal(stem(tmp_path / "training.pt", weights="raw"), raw)

    folder = save_original(Original(), tmp_path / "none", TAMING_TARGET, "state_dict")
    with pytest.raises(ValueError, match="holds no moving average.*weights='raw'"):
        VQGANModel.from_original(folder, weights="ema")
    with pytest.raises(ValueError, match="weights='best' must be one of"):
        VQGANModel.from_original(folder, weights="best")


def test_inside_a_larger_model(tmp_path):
    original = Original(attention=())
    inner = {f"first_stage_model.{key}": value for key, value in original.state_dict().items()}
    others = {
        "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(3),
        "model_ema.diffusion_modelinput_blocks00weight": torch.zeros(3),
        "model_ema.num_updates": torch.tensor(-1),
        "cond_stage_model.encoder.conv_in.weight": torch.zeros(3),
        "scale_factor": torch.tensor(1.0),
        "betas": torch.zeros(10),
    }
    torch.save({"state_dict": others | inner}, tmp_path / "model.ckpt")
    ddconfig = {"resolution": 64, "z_channels": 6, "ch": 32}
    first = {"target": "ldm.models.autoencoder.VQModelInterface", "params": {"embed_dim": 4, "ddconfig": ddconfig}}
    config = {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": {"first_stage_config": first}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    model = VQGANModel.from_original(tmp_path)
    pixels = images(original)
    assert_same(outputs(model, pixels, False), original.run(pixels))
    assert model.config.sample_size == 64

    for prefix in ("module.", "model.vqmodel.", "gen_vision_model.", "somebodys.tokenizer."):
        wrapped = {f"{prefix}{key}": value for key, value in original.state_dict().items()}
        save_file(wrapped | {"lm_head.weight": torch.zeros(3)}, tmp_path / "wrapped.safetensors")
        wrapped = VQGANModel.from_original(tmp_path / "wrapped.safetensors", config=TAMING_TARGET)
        assert_same(outputs(wrapped, pixels, False), original.run(pixels))
    two = {f"{prefix}{key}": value for prefix in ("a.", "b.") for key, value in original.state_dict().items()}
    save_file({key: value.clone() for key, value in two.items()}, tmp_path / "wrapped.safetensors")
    with pytest.raises(ValueError, match=r"holds several autoencoders: a\., b\."):
        VQGANModel.from_original(tmp_path / "wrapped.safetensors")

    # in several files, too
    (tmp_path / "sharded").mkdir()
    halves = list(inner)[::2], list(inner)[1::2]
    places = {}
    for number, half in enumerate(halves):
        save_file({key: inner[key] for key in half}, tmp_path / "sharded" / f"{number}.safetensors")
        places |= dict.fromkeys(half, f"{number}.safetensors")
    index = tmp_path / "sharded" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert_same(outputs(VQGANModel.from_original(index.parent), pixels, False), original.run(pixels))
    (index.parent / "1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="shards that are not there: 1.safetensors"):
        VQGANModel.from_original(index.parent)


def test_ema_codebook_of_taming(tmp_path):
    sums = {"cluster_size": torch.rand(24), "embed_avg": torch.randn(24, 4)}
    extra = {f"quantize.embedding.{key}": value for key, value in sums.items()}
    model = VQGANModel.from_original(save_original(Original(), tmp_path, TAMING_TARGET, "state_dict", **extra))
    assert model.config.quantizer == "vq_ema"
    assert torch.equal(model.quantize.cluster_size, sums["cluster_size"])
    assert torch.equal(model.quantize.embed_avg, sums["embed_avg"])


def test_beta_lands_on_the_term_it_was_on(tmp_path):
    """taming's quantizer multiplies the codebook term by β, LlamaGen's the commitment term."""
    taming = VQGANModel.from_original(save_original(Original(), tmp_path / "a", {"beta": 0.5}, "state_dict"))
    assert (taming.config.commitment_weight, taming.config.codebook_weight) == (1.0, 0.5)
    original = OriginalLlamaGen(lowest_first=True)
    llamagen = VQGANModel.from_original(save_original(original, tmp_path / "b", {"commit_loss_beta": 0.5}, "model"))
    assert (llamagen.config.commitment_weight, llamagen.config.codebook_weight) == (0.5, 1.0)


def test_ambiguous_keys_are_said_to_be(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(convert_module.logger, "warning", said.append)
    folder = save_original(Original(), tmp_path, {}, "state_dict")
    VQGANModel.from_original(folder)
    assert len(said) == 1 and "for IBQ pass format='ibq', for openMUSE format='openmuse'" in said[0]
    VQGANModel.from_original(folder, config=TAMING_TARGET)
    assert len(said) == 1
    assert VQGANModel.from_original(folder, format="ibq").config.quantizer == "ibq"
    assert len(said) == 2 and "family" not in said[1] and "tanh_out: taken as false" in said[1]
    assert VQGANModel.from_original(folder, format="ibq", config=TAMING_TARGET).config.quantizer == "ibq"
    assert len(said) == 2


def test_each_assumption_is_said_once_with_what_settles_it(tmp_path, monkeypatch):
    """LlamaGen's l2-norm, the averages that both classes of SEED-Voken have: no tensor shows them."""
    said = []
    monkeypatch.setattr(convert_module.logger, "warning", said.append)
    llamagen = save_original(OriginalLlamaGen(lowest_first=True), tmp_path / "a", {}, "model")
    assert VQGANModel.from_original(llamagen).config.codebook_l2_norm
    assert len(said) == 1 and "codebook_l2_norm: taken as true" in said[0] and "config settles" in said[0]
    assert not VQGANModel.from_original(llamagen, config={"codebook_l2_norm": False}).config.codebook_l2_norm
    assert len(said) == 1

    original = Original()
    averages = flat_shadow(original.state_dict()) | {"model_ema.num_updates": torch.tensor(-1, dtype=torch.int32)}
    voken = save_original(original, tmp_path / "b", {}, "state_dict", **averages)
    assert VQGANModel.from_original(voken).config.quantizer == "ibq"
    assert len(said) == 2 and "model.class_path" in said[1] and "pass format='seed_voken'" in said[1]
    assert VQGANModel.from_original(voken, format="seed_voken").config.quantizer == "vq"


def test_seed_voken_evaluates_the_averages_of_its_vqmodel_too(tmp_path, monkeypatch):
    original = Original()
    raw = original.state_dict()["encoder.conv_in.weight"]
    averages = flat_shadow(original.state_dict()) | {"model_ema.num_updates": torch.tensor(-1, dtype=torch.int32)}
    folder = save_original(original, tmp_path, {}, "state_dict", **averages)
    for use_ema, shift in ((True, 1), (False, 0)):
        kind = {"class_path": "src.IBQ.models.ibqgan.VQModel", "init_args": {"use_ema": use_ema}}
        model = VQGANModel.from_original(folder, config={"model": kind})
        assert model.config.quantizer == "vq" and torch.equal(model.encoder.conv_in.weight, raw + shift)
    kind["init_args"] = {"use_ema": "no"}
    with pytest.raises(ValueError, match="use_ema='no', expected true or false"):
        VQGANModel.from_original(folder, config={"model": kind})

    said = []
    monkeypatch.setattr(convert_module.logger, "warning", said.append)
    folder = save_original(original, tmp_path / "without", {}, "state_dict")
    kind["init_args"] = {"use_ema": True}
    assert torch.equal(VQGANModel.from_original(folder, config={"model": kind}).encoder.conv_in.weight, raw)
    assert len(said) == 1 and "no moving averages in spite of use_ema" in said[0]


EMU = {"ddconfig": {"ch": 32, "z_channels": 6}, "n_embed": 24, "embed_dim": 4, "beta": 0.25}


@pytest.mark.parametrize("told", [{"use_entropy_loss": False, "cosine_similarity": True}, {}])
def test_flat_config_of_emu(told, tmp_path, monkeypatch):
    """Emu3.5's IBQ has taming-transformers' keys and no class in its config; it never reads cosine_similarity."""
    said = []
    monkeypatch.setattr(convert_module.logger, "warning", said.append)
    original = Original(choice="product")
    folder = save_original(original, tmp_path, EMU | told, None)
    pixels = images(original)
    assert_same(outputs(VQGANModel.from_original(folder), pixels, False), original.run(pixels))
    assert len(said) == (not told)
    # the flat arguments of taming-transformers come with a loss
    taming = VQGANModel.from_original(folder, config=EMU | {"lossconfig": {"target": "taming.DummyLoss"}})
    assert taming.config.quantizer == "vq"


def test_only_ibq_itself_is_ibq(tmp_path):
    """Its module also holds a VQModel, which takes the nearest code; IBQ takes l2_normalize and never reads it."""

    def load(kind, **init_args):
        config = {"model": {"class_path": f"src.IBQ.models.ibqgan.{kind}", "init_args": init_args}}
        return VQGANModel.from_original(folder, config=config).config

    averages = {"model_ema.num_updates": torch.tensor(-1, dtype=torch.int32)}
    folder = save_original(Original(), tmp_path, {}, "state_dict", **averages)
    ibq = load("IBQ", l2_normalize=True, beta=0.25)
    assert (ibq.quantizer, ibq.codebook_l2_norm, ibq.commitment_weight, ibq.codebook_weight) == ("ibq", False, 2, 1.25)
    assert load("VQModel").quantizer == "vq"
    with pytest.raises(ValueError, match="l2_normalize=True, which VQGANModel cannot represent"):
        load("VQModel", l2_normalize=True)


def test_numbers_with_bare_exponents(tmp_path):
    """1e-08 is how json.dumps writes it; PyYAML alone reads that as a string."""
    save_original(Original(choice="gumbel", z=5, dim=5), tmp_path, {}, "state_dict")
    for name in ("config.json", "config.yaml"):
        (tmp_path / name).write_text('{"kl_weight": 1e-08, "target": "taming.models.vqgan.GumbelVQ"}')
        assert VQGANModel.from_original(tmp_path, config=tmp_path / name).config.kl_weight == 1e-8
    with pytest.raises(ValueError, match="read as taming-transformers.*kl_weight"):
        VQGANModel.from_original(tmp_path, config={"kl_weight": "much"})


# taming-transformers' remap


def test_renumbered_codes(tmp_path):
    used = torch.tensor([7, 3, 20, 11, 5])
    folder = save_original(Original(), tmp_path / "a", TAMING_TARGET, "state_dict", **{"quantize.used": used})
    model = VQGANModel.from_original(folder)
    model.save_pretrained(tmp_path / "b")
    model = VQGANModel.from_pretrained(tmp_path / "b")
    assert torch.equal(model.quantize.used, used)

    every = torch.arange(24).view(2, 3, 4)
    known = torch.isin(every, used)
    for unknown, expected in (("extra", 5), (2, 2)):
        places = model.quantize.remap_to_used(every, unknown=unknown)
        assert torch.equal(used[places[known]], every[known]) and (places[~known] == expected).all()
    places = model.quantize.remap_to_used(every)  # random, as in the original
    assert torch.equal(used[places[known]], every[known])
    assert len(places[~known].unique()) > 1 and places.min() >= 0 and places.max() < 5
    assert model.quantize.unmap_to_all(torch.tensor([[0, 4, 5]])).tolist() == [[7, 5, 7]]
    with pytest.raises(ValueError, match=r"span \[0, 6\] but 5 codes are in use"):
        model.quantize.unmap_to_all(torch.tensor([0, 6]))

    convert(folder, tmp_path / "c", to="taming")
    assert (tmp_path / "c" / "used.npy").exists()
    assert torch.equal(VQGANModel.from_original(tmp_path / "c").quantize.used, used)
    with pytest.raises(ValueError, match="cannot hold this model: num_used_codes=5"):
        model.to_original("llamagen")


def test_renumbering_that_cannot_be_kept(tmp_path):
    folder = save_original(Original(), tmp_path / "a", TAMING_TARGET, "state_dict")
    with pytest.raises(ValueError, match="renumbers the codes by remap='used.npy', but the file has no tensor"):
        VQGANModel.from_original(folder, config={"remap": "used.npy"})
    with pytest.raises(ValueError, match="num_used_codes=0: this model has no list of used codes"):
        VQGANModel.from_original(folder).quantize.remap_to_used(torch.tensor([1]))
    gumbel = Original(choice="gumbel", z=5, dim=5)
    save_original(gumbel, tmp_path / "b", TAMING_TARGET, "state_dict", **{"quantize.used": torch.arange(3)})
    with pytest.raises(
        ValueError, match="VQGANModel cannot represent `remap` in a quantizer .* surplus: quantize.used"
    ):
        VQGANModel.from_original(tmp_path / "b")


def test_half_precision_stays(tmp_path):
    folder = save_original(Original().half(), tmp_path / "a", TAMING_TARGET, "state_dict")
    model = VQGANModel.from_original(folder)
    assert model.dtype == torch.float16
    convert(folder, tmp_path / "b")
    assert VQGANModel.from_pretrained(tmp_path / "b").dtype == torch.float16


def test_encoder_only(tmp_path):
    model = VQGANModel.from_original(save_original(Original(decoder=False), tmp_path, {}, None))
    indices = model.encode_indices(torch.rand(1, 3, 16, 16))
    for call in (lambda: model.decode_indices(indices), lambda: model(torch.rand(1, 3, 16, 16))):
        with pytest.raises(ValueError, match="encoder_only=True: its checkpoint holds no decoder"):
            call()
    with pytest.raises(ValueError, match="diffusers.VQModel cannot hold this model: encoder_only=True"):
        model.to_diffusers()


# Errors: one, complete, and nothing loaded


@pytest.fixture
def taming_file(tmp_path):
    return save_original(Original(), tmp_path, TAMING_TARGET, "state_dict") / "model.ckpt"


def rewrite(file: Path, change) -> None:
    tensors = torch.load(file, weights_only=True)["state_dict"]
    change(tensors)
    torch.save({"state_dict": tensors}, file)


def test_one_error_lists_all_that_does_not_fit(taming_file):
    def change(tensors):
        del tensors["encoder.down.1.block.0.conv1.weight"], tensors["quantize.embedding.weight"]
        tensors["quantize.extra"] = tensors["decoder.up.0.block.7.oops"] = torch.zeros(2)
        tensors["decoder.mid.attn_1.q.weight"] = torch.zeros(64, 64)
        tensors["quant_conv.bias"] = torch.zeros(5)
        tensors["loss.discriminator.main.0.weight"] = torch.zeros(1)

    rewrite(taming_file, change)
    with pytest.raises(ValueError) as caught:
        VQGANModel.from_original(taming_file)
    message = str(caught.value)
    assert "2 missing: encoder.down.1.block.0.conv1.weight, quantize.embedding.weight." in message
    assert "2 surplus: " in message and "quantize.extra" in message and "decoder.up.0.block.7.oops" in message
    assert "decoder.mid.attn_1.q.weight is (64, 64), expected (64, 64, 1, 1)" in message
    assert "Nothing was loaded" in message and "loss." not in message


@pytest.mark.parametrize("name", sorted(STAND_INS))
def test_each_missing_and_each_surplus_tensor_is_noticed(name, tmp_path):
    kind, options, config, _ = STAND_INS[name]
    tensors = kind(**options).state_dict()
    keys = sorted(key for key in tensors if name != "chameleon" or not key.startswith("post_quant_conv."))
    if name in ("openmuse", "openmuse_movq"):
        keys = [key for key in keys if not re.match(r"encoder\.down\.[01]\.attn\.", key)]  # never run
    if config:
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    for key in keys[:: len(keys) // 6]:
        save_file({other: tensor for other, tensor in tensors.items() if other != key}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=re.escape(key)):
            VQGANModel.from_original(tmp_path)
    save_file(tensors | {"encoder.oops": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"surplus: encoder\.oops\."):
        VQGANModel.from_original(tmp_path)


@pytest.mark.parametrize(
    "extra, reason",
    [
        ({"encoder.mid.attn_1.to_qkv.weight": torch.zeros(1)}, "linear attention"),
        ({"encoder.mid.extra_mid_res_blocks.0.conv1.bias": torch.zeros(1)}, "more than two residual blocks"),
        ({"decoder.norm_out.conv.weight": torch.zeros(1)}, "add_conv"),
    ],
)
def test_what_cannot_be_represented_says_so(extra, reason, taming_file):
    rewrite(taming_file, lambda tensors: tensors.update(extra))
    with pytest.raises(ValueError, match=f"VQGANModel cannot represent .*{reason}"):
        VQGANModel.from_original(taming_file)


@pytest.mark.parametrize(
    "ddconfig, message",
    [
        ({"tanh_out": True}, "its config has tanh_out=True, which VQGANModel cannot represent"),
        ({"attn_type": "linear"}, "attn_type='linear'"),
        ({"z_channels": 99, "num_res_blocks": 5}, "z_channels=99 but 6; num_res_blocks=5 but 1"),
    ],
)
def test_config_that_contradicts(ddconfig, message, taming_file):
    config = {"model": {"target": "taming.models.vqgan.VQModel", "params": {"ddconfig": ddconfig}}}
    with pytest.raises(ValueError, match=re.escape(message)):
        VQGANModel.from_original(taming_file, config=config)


def test_unknown_family(tmp_path):
    save_file({"backbone.layer1.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"Seen: backbone\.layer1\.weight\. Known: .*llamagen \(LlamaGen VQ\)"):
        VQGANModel.from_original(tmp_path)
    with pytest.raises(ValueError, match="format='vae' is not one of 'auto', 'movq', 'taming', 'ldm'"):
        VQGANModel.from_original(tmp_path, format="vae")
    save_original(Original(), tmp_path / "taming", {}, "state_dict")
    with pytest.raises(ValueError, match="are not those of LlamaGen VQ"):
        VQGANModel.from_original(tmp_path / "taming", format="llamagen")
    continuous = {key: tensor for key, tensor in Original().state_dict().items() if not key.startswith("quantize.")}
    save_file(continuous, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="hold no codebook .*continuous autoencoder"):
        VQGANModel.from_original(tmp_path)


@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_truncated_file(ending, share, tmp_path):
    save_original(Original(), tmp_path, {}, "state_dict" if ending == "ckpt" else None)
    file = tmp_path / f"model.{ending}"
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    with pytest.raises(ValueError, match=rf"model\.{ending} is damaged, incomplete or no checkpoint"):
        VQGANModel.from_original(file)


def test_files_that_are_not_there(tmp_path):
    for path in (tmp_path / "nothing", "nothing", "./no/file"):
        with pytest.raises(FileNotFoundError, match="no such file or folder"):
            VQGANModel.from_original(path)
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        VQGANModel.from_original(tmp_path)
    for name in ("a.pt", "b.pt"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"several checkpoints: a\.pt, b\.pt"):
        VQGANModel.from_original(tmp_path)
    with pytest.raises(FileNotFoundError, match="config .*: no such file"):
        VQGANModel.from_original(tmp_path / "a.pt", config=tmp_path / "config.yaml")


def test_own_checkpoint_is_sent_to_from_pretrained(tmp_path, tiny_model):
    tiny_model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a VQGANModel already: use VQGANModel.from_pretrained"):
        VQGANModel.from_original(tmp_path)


# Safety


class Malicious:
    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("new_format", [True, False])
def test_malicious_pickle_is_refused_and_named(tmp_path, new_format):
    bad = Malicious()
    bad.marker = Malicious.marker = str(tmp_path / "ran")
    content = {"state_dict": Original().state_dict(), "callbacks": bad, "hooks": [eval, getattr]}
    torch.save(content, tmp_path / "model.ckpt", _use_new_zipfile_serialization=new_format)
    with pytest.raises(
        ValueError, match=r"calls for (__builtin__|builtins)\.eval, (__builtin__|builtins)\.getattr, posix\.system"
    ):
        VQGANModel.from_original(tmp_path)
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(bad))  # the trap itself works
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("new_format", [True, False])
def test_bookkeeping_of_trainers_is_passed_over_unimported(tmp_path, new_format):
    """A class that does not exist as a key and with state, a namespace: what Lightning files carry."""
    module = type(sys)("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    parents = {name: type(sys)(name) for name in ("pytorch_lightning", "pytorch_lightning.callbacks")}
    sys.modules.update(parents | {module.__name__: module})
    try:
        instance = module.ModelCheckpoint()
        instance.best = 1.5
        original = Original()
        content = {
            "state_dict": collections.OrderedDict(original.state_dict()),
            "callbacks": {module.ModelCheckpoint: {"best": instance}},
            "hyper_parameters": argparse.Namespace(lr=1.0, started=datetime.datetime(2021, 1, 1)),
            "counts": collections.defaultdict(int, a=1),
            "last": collections.deque([1, 2], maxlen=2),
        }
        torch.save(content, tmp_path / "last.ckpt", _use_new_zipfile_serialization=new_format)
    finally:
        for name in (*parents, module.__name__):
            del sys.modules[name]
    model = VQGANModel.from_original(tmp_path, format="taming")
    assert torch.equal(model.encoder.conv_in.weight, original.encoder.conv_in.weight)
    assert not any(name.startswith("pytorch_lightning") for name in sys.modules)


def test_programs_and_other_contents_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "program.pt", "w") as program:
        program.writestr("program/constants.pkl", b"")
        program.writestr("program/data.pkl", b"")
    with pytest.raises(ValueError, match="is a TorchScript program"):
        VQGANModel.from_original(tmp_path / "program.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list, not a state dict"):
        VQGANModel.from_original(tmp_path / "list.pt")
    torch.save({"weights": {}, "epoch": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="'weights', 'epoch' are not tensors"):
        VQGANModel.from_original(tmp_path / "other.pt")


# Export


def test_export_refuses_what_the_format_cannot_hold(tiny_model):
    for format in ("taming", "ldm", "llamagen"):
        with pytest.raises(ValueError, match="cannot hold this model: norm_num_groups=4, not 32"):
            tiny_model.to_original(format)
    with pytest.raises(ValueError, match="format='ibq' is not one of 'taming', 'ldm', 'llamagen', 'diffusers'"):
        tiny_model.to_original("ibq")
    fields = {**TINY, "norm_num_groups": 32, "block_out_channels": (32, 64)}
    for changes, format, message in (
        ({"quantizer": "ibq"}, "diffusers", "quantizer='ibq'"),
        ({"quantizer": "ibq"}, "taming", "quantizer='ibq'"),
        ({"pixel_range": (0, 1)}, "taming", r"pixel_range=\(0, 1\)"),
        ({"pixel_range": (0, 1), "stem_channels": 64}, "diffusers", r"pixel_range=\(0, 1\); stem_channels=64"),
        ({"mid_block_add_attention": False}, "ldm", "mid_block_add_attention=False"),
        ({"down_block_types": ("DownEncoderBlock2D",) * 2}, "taming", "different levels of encoder and decoder"),
        ({"decoder_block_out_channels": (32, 32)}, "taming", r"decoder_block_out_channels=\(32, 32\)"),
    ):
        with pytest.raises(ValueError, match=f"cannot hold this model: .*{message}"):
            VQGANModel(VQGANConfig(**fields | changes)).to_original(format)


def test_effective_codebook_is_exported(tmp_path):
    """SimVQ's codes are a product of two weights; other projects get the product, and choose the same codes."""
    fields = {**TINY, "norm_num_groups": 32, "block_out_channels": (32, 64), "quantizer": "simvq"}
    model = VQGANModel(VQGANConfig(**fields)).eval()
    tensors, config = model.to_original("taming")
    torch.save({"state_dict": tensors}, tmp_path / "model.ckpt")
    again = VQGANModel.from_original(tmp_path, config=config)
    pixels = torch.rand(1, 3, 16, 16)
    assert torch.equal(again.encode_indices(pixels), model.encode_indices(pixels))


def test_llamagen_halves_of_different_width(tmp_path):
    fields = {**TINY, "norm_num_groups": 32, "block_out_channels": (32, 64), "decoder_block_out_channels": (64, 96)}
    model = VQGANModel(VQGANConfig(**fields, codebook_l2_norm=True)).eval()
    tensors, config = model.to_original("llamagen")
    assert (config["encoder_ch_mult"], config["decoder_ch_mult"]) == ([1, 2], [2, 3])
    torch.save({"model": tensors}, tmp_path / "vq.pt")
    again = VQGANModel.from_original(tmp_path, config=config)
    assert again.config.decoder_block_out_channels == (64, 96)
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())


# The rest of the package


def test_exports_to_diffusers(tmp_path):
    original = Original(mult=(1, 2), attention=(1,))
    model = VQGANModel.from_original(save_original(original, tmp_path, {}, "state_dict"))
    pixels = images(original)
    with torch.no_grad():
        torch.testing.assert_close(
            model.to_diffusers().eval()(pixels).sample, original.run(pixels)["reconstruction"], atol=1e-4, rtol=0
        )


def test_imported_weights_do_not_depend_on_the_file(taming_file):
    model = VQGANModel.from_original(taming_file)
    before = model.quant_conv.weight.clone()
    with open(taming_file, "r+b") as file:
        file.write(b"\0" * taming_file.stat().st_size)
    assert torch.equal(model.quant_conv.weight, before)
    model.quant_conv.weight.sum().backward()  # trainable


def test_hub(tmp_path, monkeypatch):
    """`owner/name`, with a folder or a file; only what is needed is fetched."""
    original = OriginalLlamaGen(lowest_first=True)
    save_original(original, tmp_path / "vq", {}, "model")
    (tmp_path / "vq" / "model.ckpt").rename(tmp_path / "vq" / "vq_ds4.pt")
    (tmp_path / "vq" / "vq_ds4.json").write_text('{"codebook_l2_norm": false}')
    fetched = []

    def download(repo, name):
        fetched.append(name)
        return str(tmp_path / name)

    files = ["README.md", "gpt.safetensors", "vq/vq_ds4.pt", "vq/vq_ds4.json"]
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, repo: files)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for path in ("owner/name/vq/vq_ds4.pt", "owner/name/vq"):
        model = VQGANModel.from_original(path)
        assert not model.config.codebook_l2_norm
        assert torch.equal(model.encoder.conv_in.weight, original.encoder.conv_in.weight)
    assert fetched == ["vq/vq_ds4.pt", "vq/vq_ds4.json"] * 2
    with pytest.raises(FileNotFoundError, match="owner/name/other holds no checkpoint"):
        VQGANModel.from_original("owner/name/other")


def run_script(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "scripts" / "convert_checkpoint.py", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)


def test_script(taming_file, tmp_path):
    there, back = tmp_path / "there", tmp_path / "back"
    done = run_script(taming_file, there)
    assert done.returncode == 0, done.stderr
    assert "24 codes of 4 numbers" in done.stdout
    model = VQGANModel.from_pretrained(there)
    assert sorted(file.name for file in there.iterdir() if file.suffix != ".py") == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]

    convert(there, back, to="taming")
    stored = torch.load(taming_file, weights_only=True)["state_dict"]
    exported = torch.load(back / "model.ckpt", weights_only=True)["state_dict"]
    assert stored.keys() == exported.keys() and all(torch.equal(stored[key], exported[key]) for key in stored)
    assert torch.equal(model.quantize.embedding.weight, stored["quantize.embedding.weight"])

    refused = run_script(taming_file, there)
    assert refused.returncode == 1 and "exists and is not an empty folder" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_failed_conversion_leaves_nothing(taming_file, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(VQGANModel, "save_pretrained", fail)
    before = set(tmp_path.iterdir())
    with pytest.raises(OSError, match="disk full"):
        convert(taming_file, tmp_path / "out")
    assert set(tmp_path.iterdir()) == before


def test_every_format_is_documented():
    text = (ROOT / "docs" / "checkpoints.md").read_text()
    assert {name for name in FAMILIES if f"`{name}`" not in text} == set()
    assert {name for name in EXPORTS if f"--to {name}" not in text} == set()
