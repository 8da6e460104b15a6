import json
import math
from dataclasses import fields

import pytest
from conftest import SPECIAL, TINY
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModel

from hf_vqgan import QUANTIZERS, VQGANConfig, VQGANModel
from hf_vqgan.configuration_vqgan import model_fields


def test_round_trip(tmp_path, tiny_config):
    tiny_config.save_pretrained(tmp_path)
    assert VQGANConfig.from_pretrained(tmp_path).to_dict() == tiny_config.to_dict()


def test_misspelt_field_is_reported_with_the_right_name():
    with pytest.raises(ValueError, match="num_vq_embedings.*did you mean 'num_vq_embeddings'"):
        VQGANConfig(num_vq_embedings=3)


def test_surplus_keys_of_a_file_are_kept_with_one_warning(tmp_path, tiny_config):
    """Others write into configs, and files outlive releases. What libraries add of their own accord is no news."""
    VQGANModel(tiny_config).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    written |= {"num_codes": 3, "ema_deca": 0.5, "use_cache": False}
    (tmp_path / "config.json").write_text(json.dumps(written))
    for read in (
        lambda: VQGANConfig.from_pretrained(tmp_path),
        lambda: AutoConfig.from_pretrained(tmp_path),
        lambda: VQGANConfig.from_dict(written),
        lambda: VQGANConfig.from_json_file(tmp_path / "config.json"),
        lambda: VQGANModel.from_pretrained(tmp_path).config,
        lambda: AutoModel.from_pretrained(tmp_path).config,
    ):
        with pytest.warns(UserWarning) as caught:
            config = read()
        assert len(caught) == 1
        text = str(caught[0].message)
        assert "'num_codes'" in text and "'ema_deca' (did you mean 'ema_decay'?)" in text and "use_cache" not in text
        assert (config.num_codes, config.ema_deca, config.ema_decay) == (3, 0.5, 0.99)
    config.save_pretrained(tmp_path / "again")
    with pytest.warns(UserWarning, match="num_codes"):
        assert VQGANConfig.from_pretrained(tmp_path / "again", num_codes=4).num_codes == 4
    for misspelt in ({"num_codes": 3}, {"ema_deca": 0.5}):  # in Python, reading leaves no lenience behind
        with pytest.raises(ValueError, match=f"has no field '{next(iter(misspelt))}'"):
            VQGANConfig(**misspelt)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"block_out_channels": (32, 48), "norm_num_groups": 32}, r"norm_num_groups=32 does not divide.*\[48\]"),
        ({"num_vq_embeddings": 0}, "num_vq_embeddings=0 must be at least 1"),
        ({"norm_type": "batch"}, "norm_type='batch'"),
        ({"down_block_types": ("DownEncoderBlock2D",)}, "down_block_types has 1 entries"),
        (
            {"quantizer": "lfq", "num_vq_embeddings": 100, "vq_embed_dim": 8},
            r"num_vq_embeddings=100 must be 2\*\*vq_embed",
        ),
        ({"quantizer": "fsq"}, "fsq_levels=None"),
        ({"quantizer": "residual"}, "num_codebooks=1 does not go with quantizer='residual'"),
        ({"num_codebooks": 2}, "num_codebooks=2 does not go with quantizer='vq'"),
        ({"quantizer": "grouped", "num_codebooks": 3, "vq_embed_dim": 8}, "vq_embed_dim=8 is not a multiple"),
        ({"quantizer": "residual", "num_codebooks": 2, "base_quantizer": "fsq"}, "base_quantizer='fsq' must be one of"),
        ({"ema_decay": 1.5}, "ema_decay=1.5 must be in"),
        ({"backbone": "resnet"}, "backbone='resnet' must be"),
        ({"backbone": "maskgit", "vq_embed_dim": 8, "latent_channels": 16}, "vq_embed_dim=8 must.*latent_channels=16"),
        ({"backbone": "maskgit", "vq_embed_dim": None, "norm_type": "spatial"}, "no spatial norms"),
        ({"pixel_range": (0, 255)}, r"pixel_range=\(0, 255\) must be"),
        ({"stem_channels": 48}, r"does not divide.*\[48\] in stem_channels=48"),
        ({"decoder_block_out_channels": (32,)}, "decoder_block_out_channels has 1 entries"),
        ({"normalize_on_lookup": True, "quantizer": "ibq"}, "normalize_on_lookup=True is for quantizer='vq'"),
        ({"num_used_codes": 9000}, r"num_used_codes=9000 must be in \[0, 8192\]"),
        ({"num_used_codes": 3, "quantizer": "ibq"}, "num_used_codes=3 .* not for 'ibq'"),
        ({"num_used_codes": 3, "quantizer": "grouped", "num_codebooks": 2}, "num_used_codes=3 .* not for 'grouped'"),
        ({"num_codebooks": 0}, "num_codebooks=0 must be at least 1"),
        ({"num_codebooks": -2, "quantizer": "residual"}, "num_codebooks=-2 must be at least 1"),
        ({"sample_size": 30, "block_out_channels": (32, 32, 32)}, "sample_size=30 must be a multiple of 4"),
        ({"perturbation_neighbours": 0}, "perturbation_neighbours=0 must be at least 1"),
        ({"norm_num_groups": 0}, "norm_num_groups=0 must be at least 1"),
        ({"norm_num_groups": -8}, "norm_num_groups=-8 must be at least 1"),
        ({"block_out_channels": ()}, r"block_out_channels=\(\) must have at least one level"),
        ({"block_out_channels": (32, 0)}, r"block_out_channels=\(32, 0\) must be at least 1, each of them"),
        ({"decoder_block_out_channels": ()}, "decoder_block_out_channels has 0 entries"),
        ({"norm_type": "spatial", "norm_num_groups": 8, "block_out_channels": (32, 48)}, r"'spatial' has 32.*\[48\]"),
        ({"down_block_types": ["DownBlock2D"] * 5}, "down_block_types=.* must be one of 'DownEncoderBlock2D'"),
        ({"up_block_types": ["UpEncoderBlock2D"] * 5}, "up_block_types=.* must be one of 'UpDecoderBlock2D'"),
        ({"act_fn": "sigmoid"}, "act_fn='sigmoid' must be one of 'silu'"),
        ({"quantizer": "lfq", "vq_embed_dim": 10**12}, "62 at most"),
        ({"quantizer": "fsq", "fsq_levels": [1000] * 30}, "more than 2.*62 codes"),
        ({"quantizer": "fsq", "fsq_levels": [8, 1]}, r"fsq_levels=\[8, 1\] must be at least 2, each of them"),
        ({"in_channels": 10**400}, "in_channels=1.* must be a finite number"),
        (
            {"rotation_trick": True, "quantizer": "fsq"},
            "rotation_trick=True is for quantizer='vq', 'vq_ema' or 'simvq'",
        ),
        (
            {"ema_decay": 0.5, "quantizer": "grouped", "num_codebooks": 2},
            "not for 'grouped' with base_quantizer='vq'",
        ),
        ({"base_quantizer": "simvq"}, "base_quantizer='simvq' is for quantizer='residual' or 'grouped', not for 'vq'"),
    ],
)
def test_contradictions_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        VQGANConfig(**fields)


FLOATS = [item.name for item in fields(VQGANConfig) if "float" in str(item.type) and item.name in model_fields()]


@pytest.mark.parametrize("name", FLOATS)
def test_floats_are_finite_and_have_a_range(name):
    for value in (math.nan, math.inf, -math.inf, *([] if name == "shift_factor" else [-0.1])):
        with pytest.raises(ValueError, match=f"{name}={value} must be"):
            VQGANConfig(**{name: value})
    if name in ("scaling_factor", "entropy_temperature", "gumbel_temperature"):
        with pytest.raises(ValueError, match=f"{name}=0 must be"):
            VQGANConfig(**{name: 0})


@pytest.mark.parametrize("act_fn", VQGANConfig.__dataclass_fields__["act_fn"].metadata["one_of"])
def test_every_activation_builds(act_fn):
    VQGANModel(VQGANConfig(**TINY, act_fn=act_fn))


def test_options_that_were_ignored_still_load_from_a_file(tmp_path, tiny_config):
    """Files that earlier versions wrote; an error would take the models away that they describe."""
    VQGANModel(tiny_config).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    written |= {"quantizer": "gumbel", "rotation_trick": True, "commitment_weight": 1.0, "kl_weight": 0.1}
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.warns(UserWarning, match="commitment_weight=1.0 is for .*; rotation_trick=True is for"):
        config = VQGANConfig.from_pretrained(tmp_path)
    assert (config.quantizer, config.rotation_trick, config.commitment_weight) == ("gumbel", False, 0.25)
    assert config.kl_weight == 0.1
    with pytest.raises(ValueError, match="rotation_trick=True is for"):
        VQGANConfig(quantizer="gumbel", rotation_trick=True)


def test_wrong_type_is_named():
    with pytest.raises(StrictDataclassError, match="num_vq_embeddings.*expected int"):
        VQGANConfig(num_vq_embeddings="many")


def test_every_field_is_read(pixels):
    """A field that neither the model, nor the trainer, nor the exported diffusers model reads is a lie."""
    read = set()

    class Watched(VQGANConfig):
        def __getattribute__(self, name):
            read.add(name)
            return super().__getattribute__(name)

    by_others = {"shift_factor"}  # read by diffusers' pipelines from `vae.config`
    for name in QUANTIZERS:
        config = Watched(quantizer=name, **TINY | SPECIAL.get(name, {}))
        read.clear()
        model = VQGANModel(config)
        model(pixels)
        by_others |= read | {f"{loss}_weight" for loss in model.quantize.loss_names}  # the trainer's, by that name
        if model.quantize.to_codebook() is not None:
            by_others |= set(model.to_diffusers().config)
    assert set(model_fields()) <= by_others


def test_folder_without_config_is_an_error(tmp_path):
    """transformers gives the default config, which then loads into nothing or, worse, trains."""
    for kind in (VQGANConfig, VQGANModel):
        with pytest.raises(OSError, match="does not appear to have a file named config.json"):
            kind.from_pretrained(tmp_path)


def test_fields_given_to_from_pretrained_are_checked(tmp_path, tiny_config):
    VQGANModel(tiny_config).save_pretrained(tmp_path)
    assert VQGANModel.from_pretrained(tmp_path, quantizer="vq_ema", ema_decay=0.9).config.ema_decay == 0.9
    for changes in ({"quantizer": "fsq"}, {"norm_num_groups": 3}, {"block_out_channels": (8, 16, 32)}):
        for kind in (VQGANConfig, VQGANModel):
            with pytest.raises(ValueError, match=next(iter(changes))):
                kind.from_pretrained(tmp_path, **changes)
