"""
Random model configurations: what is accepted works, what is not is refused in one error that names a culprit.

A configuration is drawn valid; then up to three of its fields get the value of another one, or one that no field should
have. Nothing large is ever built.
"""

import math
import random

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from hf_vqgan import QUANTIZERS, VQGANConfig, VQGANModel
from hf_vqgan.configuration_vqgan import DOWN_BLOCKS, UP_BLOCKS, model_fields

NONSENSE = [
    None, True, False, 0, -1, 1, 3, 7, 1.0, 2.5, -0.5, 5e-324, 1e308, math.nan, math.inf, -math.inf, 10**12, 2**62,
    2**63, -(2**70), 10**400, "", "3", "vq", "None", b"vq", [], (), {}, [[]], [None], [0], [-8, 8], [8.0], [math.nan],
    [10**30, 8], [True], ["vq"], (8,), [8, 8, 8, 8, 8, 8], {"a": 1}, [2, 2], ["DownBlock2D", "DownEncoderBlock2D"],
]  # fmt: skip


def valid_fields(rng: random.Random) -> dict:
    """A configuration that has to be accepted."""
    levels, groups = rng.randint(1, 3), rng.choice([1, 2, 4])
    channels = [groups * rng.randint(1, 6) for _ in range(levels)]
    latent = rng.randint(1, 8)
    fields = {
        "in_channels": rng.randint(1, 4),
        "out_channels": rng.randint(1, 4),
        "block_out_channels": channels,
        "sample_size": 2 ** (levels - 1) * rng.randint(1, 4),
        "layers_per_block": rng.randint(1, 2),
        "mid_block_add_attention": rng.random() < 0.5,
        "act_fn": rng.choice(["silu", "swish", "mish", "gelu", "relu"]),
        "norm_num_groups": groups,
        "latent_channels": latent,
        "vq_embed_dim": rng.choice([None, 2, 4, 6]),
        "num_vq_embeddings": rng.choice([1, 2, 16, 1030]),
        "pixel_range": rng.choice([(-1, 1), [0, 1]]),
        "encoder_only": rng.random() < 0.2,
        "scaling_factor": rng.choice([1, 0.2, 7.5]),
        "shift_factor": rng.choice([0, -0.3]),
    }
    match rng.choice(["plain", "maskgit", "spatial", "blocks"]):
        case "maskgit":
            fields |= {"backbone": "maskgit", "vq_embed_dim": latent}
        case "spatial":
            fields |= {"norm_type": "spatial", "decoder_block_out_channels": [32] * levels, "norm_num_groups": 1}
        case "blocks":
            fields["stem_channels"] = groups * rng.randint(1, 3)
            fields["down_block_types"] = rng.choices(DOWN_BLOCKS, k=levels)
            fields["up_block_types"] = rng.choices(UP_BLOCKS, k=levels)
    return fields | valid_quantizer(rng, fields)


def valid_quantizer(rng: random.Random, fields: dict) -> dict:
    name = rng.choice(sorted(QUANTIZERS))
    dim = fields["vq_embed_dim"] or fields["latent_channels"]
    chosen = {"quantizer": name}
    kind = name
    if name in ("residual", "grouped"):
        kind = chosen["base_quantizer"] = rng.choice(["vq", "vq_ema", "simvq"])
        chosen["num_codebooks"] = rng.randint(2, 3) if name == "residual" else 2
        if name == "grouped" and dim % 2:
            chosen |= {"vq_embed_dim": 2 * dim, "latent_channels": 2 * dim}
    options = {}
    if kind in ("vq", "vq_ema", "simvq", "ibq"):
        options = {"commitment_weight": 0.5, "entropy_weight": 0.1, "entropy_temperature": 0.7,
                   "perturbation_share": 0.3, "perturbation_neighbours": rng.randint(1, 20)}  # fmt: skip
        options |= {"codebook_l2_norm": True} if name != "residual" else {}
        options |= {"rotation_trick": True} if kind != "ibq" else {}
        options |= {"codebook_weight": 0} if kind != "vq_ema" else {"ema_decay": rng.choice([0, 0.5, 1])}
    elif kind == "gumbel":
        options = {"kl_weight": 0.1, "gumbel_temperature": 0.3}
    elif kind == "fsq":
        size = dim if fields.get("backbone") == "maskgit" else rng.randint(1, 4)
        chosen["fsq_levels"] = [rng.randint(2, 5) for _ in range(size)]
    else:
        options = {"entropy_weight": 1, "entropy_temperature": 0.05}
        chosen["num_vq_embeddings"] = 2**dim
    return chosen | {option: value for option, value in options.items() if rng.random() < 0.4}


def is_large(config: VQGANConfig) -> bool:
    sizes = [config.in_channels, config.out_channels, config.latent_channels, config.vq_embed_dim, config.stem_channels]
    sizes += [*config.block_out_channels, *config.decoder_block_out_channels]
    codes = config.num_vq_embeddings if config.quantizer not in ("fsq", "lfq", "bsq") else 0
    return max(sizes) > 64 or codes > 5000 or config.num_codebooks > 20 or config.layers_per_block > 8


def try_out(config: VQGANConfig, folder) -> None:
    """One step of training, and the model from its files again."""
    torch.manual_seed(0)
    model = VQGANModel(config)
    side = 2 * config.downsample_factor
    pixels = torch.rand(2, config.in_channels, side, side) * 2 - 1
    if config.encoder_only:
        output = model.quantize(model.encode(pixels).latents)
        loss = output.quantized.square().mean()
    else:
        output = model(pixels)
        loss = (output.sample - 1).square().mean()
        assert output.sample.shape == (2, config.out_channels, side, side)
    loss = loss + sum(getattr(config, f"{name}_weight") * term for name, term in output.losses.items())
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients and loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients)

    model.eval().save_pretrained(folder)
    again = VQGANModel.from_pretrained(folder)
    assert all(getattr(again.config, name) == getattr(config, name) for name in model_fields())
    with torch.no_grad():
        assert torch.equal(again.encode_indices(pixels), model.encode_indices(pixels))


def check(seed: int, folder) -> str:
    """What became of the configuration: "works", "refused", or "large"."""
    rng = random.Random(seed)
    fields, other = valid_fields(rng), valid_fields(rng)
    changed = rng.sample(model_fields(), rng.choice([0, 0, 1, 1, 2, 3]))
    for name in changed:
        another = other.get(name, getattr(VQGANConfig, name))
        fields[name] = another if rng.random() < 0.3 else rng.choice(NONSENSE)
    try:
        config = VQGANConfig(**fields)
    except (ValueError, TypeError, StrictDataclassError) as error:
        assert any(name in str(error) for name in changed), f"{seed}: it is one of {changed}, but {error}"
        return "refused"
    if is_large(config):
        return "large"
    try:
        if config.quantizer in QUANTIZERS:
            try_out(config, folder)
        else:  # others may be registered until a model is built
            with pytest.raises(ValueError, match="quantizer="):
                VQGANModel(config)
    except Exception as error:
        raise AssertionError(f"{seed}: accepted, but fails: {fields}") from error
    return "works"


@pytest.mark.parametrize("block", range(5))
def test_random_configurations(block, tmp_path):
    seen = {check(seed, tmp_path) for seed in range(30 * block, 30 * (block + 1))}
    assert {"works", "refused"} <= seen


@pytest.mark.slow
@pytest.mark.parametrize("block", range(100))
def test_many_random_configurations(block, tmp_path):
    for seed in range(1000 + 30 * block, 1000 + 30 * (block + 1)):
        check(seed, tmp_path)
