"""A VQGANModel as the autoencoder of our own pipeline and of diffusers' stock ones, here and in a fresh process."""

import copy
import json
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from conftest import photo
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from hf_vqgan import VQGANLatentDiffusionPipeline

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch_dtype.*:FutureWarning"),
]

SIDE = 8  # of the latents: 16-pixel images


def tiny_unet(num_classes: int = 0) -> diffusers.UNet2DModel:
    return diffusers.UNet2DModel(
        sample_size=SIDE,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=num_classes + 1 if num_classes else None,
    )


def tiny_dit(num_classes: int, out_channels: int = 4) -> diffusers.DiTTransformer2DModel:
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=out_channels,
        num_layers=1,
        sample_size=SIDE,
        num_embeds_ada_norm=num_classes,
    ).eval()


def tiny_conditional_unet(**fields) -> diffusers.UNet2DConditionModel:
    defaults = dict(
        sample_size=SIDE,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
    )
    return diffusers.UNet2DConditionModel(**defaults | fields)


def tiny_text(kind: type) -> dict:
    """A text encoder and its tokenizer, which knows a few letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {word: number for number, word in enumerate(words)}
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        bos_token_id=0,
        eos_token_id=1,
    )
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=12)
    return {"text_encoder": kind(config).eval(), "tokenizer": tokenizer}


def stable_diffusion(vae) -> diffusers.StableDiffusionPipeline:
    return diffusers.StableDiffusionPipeline(
        vae=vae,
        unet=tiny_conditional_unet(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **tiny_text(CLIPTextModel),
    )


def amused(vqvae) -> diffusers.AmusedPipeline:
    transformer = diffusers.UVit2DModel(
        hidden_size=16,
        cond_embed_dim=16,
        micro_cond_encode_dim=2,
        micro_cond_embed_dim=10,
        encoder_hidden_size=16,
        vocab_size=72,
        codebook_size=vqvae.config.num_vq_embeddings,
        in_channels=8,
        block_out_channels=8,
        num_res_blocks=1,
        block_num_heads=1,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=16,
        sample_size=SIDE,
    )
    scheduler = diffusers.AmusedScheduler(mask_token_id=71)
    text = tiny_text(CLIPTextModelWithProjection)
    return diffusers.AmusedPipeline(vqvae=vqvae, transformer=transformer, scheduler=scheduler, **text)


def kandinsky(movq) -> diffusers.KandinskyV22Pipeline:
    unet = tiny_conditional_unet(
        out_channels=8,  # noise and variance
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        addition_embed_type="image",
        encoder_hid_dim=16,
        encoder_hid_dim_type="image_proj",
        resnet_time_scale_shift="scale_shift",
    )
    scheduler = diffusers.DDPMScheduler(clip_sample=False, variance_type="learned_range")
    return diffusers.KandinskyV22Pipeline(unet=unet, scheduler=scheduler, movq=movq)


def own(vqvae, denoiser, scheduler, id2label=None) -> VQGANLatentDiffusionPipeline:
    return VQGANLatentDiffusionPipeline(vqvae, denoiser, scheduler, id2label)


FLOW, DDPM = diffusers.FlowMatchEulerDiscreteScheduler, diffusers.DDPMScheduler
NAMES = {0: "cat", 1: "dog", 2: "eel"}
CLASSES = {"class_labels": ["dog", 2], "guidance_scale": 2.0}
EMBEDS = {"image_embeds": [[0.5] * 16], "negative_image_embeds": [[0.0] * 16]}

# Name: how to build it on a VQGANModel, how to call it, the class to load it with.
PIPELINES = {
    "own_unconditional": (lambda vqgan: own(vqgan, tiny_unet(), FLOW()), {"batch_size": 2}, "DiffusionPipeline"),
    "own_unet_classes": (lambda vqgan: own(vqgan, tiny_unet(3), DDPM(), NAMES), CLASSES, "DiffusionPipeline"),
    "own_dit_classes": (lambda vqgan: own(vqgan, tiny_dit(3, 8), FLOW(), NAMES), CLASSES, "DiffusionPipeline"),
    "own_on_vqmodel": (lambda vqgan: own(vqgan.to_diffusers(), tiny_unet(), DDPM()), {}, "DiffusionPipeline"),
    # In float32 only: LDMPipeline makes float32 noise and does not cast it, whatever its autoencoder.
    "ldm": (lambda vqgan: diffusers.LDMPipeline(vqgan, tiny_unet(), diffusers.DDIMScheduler()), {}, "LDMPipeline"),
    "text_to_image": (stable_diffusion, {"prompt": "a cat", "height": 16, "width": 16}, "StableDiffusionPipeline"),
    "image_to_image": (
        lambda vqgan: diffusers.StableDiffusionImg2ImgPipeline(**stable_diffusion(vqgan).components,
                                                               requires_safety_checker=False),
        {"prompt": "a cat", "image": "start.png", "strength": 0.8},
        "StableDiffusionImg2ImgPipeline",
    ),
    # 1000 classes: DiTPipeline has number 1000 for "no class" written into its code.
    "dit": (
        lambda vqgan: diffusers.DiTPipeline(tiny_dit(1000, 8), vqgan, diffusers.DDIMScheduler()),
        {"class_labels": [1, 7]},
        "DiTPipeline",
    ),
    "amused": (amused, {"prompt": "a cat"}, "AmusedPipeline"),
    "kandinsky": (kandinsky, EMBEDS | {"height": 16, "width": 16}, "KandinskyV22Pipeline"),
}  # fmt: skip

CALL = """
import diffusers, torch
from PIL import Image

def picture(pipeline, options):
    options = {
        name: torch.tensor(value) if "embeds" in name else Image.open(value) if name == "image" else value
        for name, value in options.items()
    }
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(**options, num_inference_steps=3, generator=generator, output_type="np").images
"""
FRESH = (
    CALL
    + """
import json, sys
import numpy as np

for number, (name, (options, kind)) in enumerate(json.load(open("calls.json")).items()):
    if number == 1:
        import hf_vqgan
    np.save(f"{name}.fresh.npy", picture(getattr(diffusers, kind).from_pretrained(name), options))
"""
)


@pytest.fixture(scope="module")
def pictures(trained_model, tmp_path_factory):
    """Each pipeline's picture before saving, and after loading in one fresh process."""
    folder = tmp_path_factory.mktemp("pipelines")
    namespace = {}
    exec(CALL, namespace)
    photo(3, (16, 16)).save(folder / "start.png")
    # The first is loaded before hf_vqgan is imported: a stock pipeline on the exported model needs no such package.
    exported = lambda vqgan: diffusers.LDMPipeline(vqgan.to_diffusers(), tiny_unet(), diffusers.DDIMScheduler())  # noqa: E731
    cases = {"ldm_exported": (exported, {}, "LDMPipeline")} | PIPELINES
    found, calls = {}, {}
    for name, (build, options, kind) in cases.items():
        torch.manual_seed(0)
        pipeline = build(copy.deepcopy(trained_model))
        if "image" in options:
            options = options | {"image": str(folder / options["image"])}
        calls[name] = options, kind
        found[name] = namespace["picture"](pipeline, options)
        pipeline.save_pretrained(folder / name)
    (folder / "calls.json").write_text(json.dumps(calls))
    done = subprocess.run([sys.executable, "-c", FRESH], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: (picture, np.load(folder / f"{name}.fresh.npy")) for name, picture in found.items()}


@pytest.mark.parametrize("name", ["ldm_exported", *PIPELINES])
def test_same_picture_in_a_fresh_process(pictures, name):
    here, there = pictures[name]
    assert here.shape[1:] == (16, 16, 3) and here.std() > 0.01
    np.testing.assert_allclose(there, here, atol=1e-5)
