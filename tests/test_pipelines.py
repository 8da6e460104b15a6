"""A VQGANModel as the autoencoder of our own pipeline and of diffusers' stock ones, here and in a fresh process."""

import copy
import json
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from conftest import SPECIAL, TINY, photo
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from hf_vqgan import VQGANConfig, VQGANLatentDiffusionPipeline, VQGANModel

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch_dtype.*:FutureWarning"),
]

SIDE = 8  # of the latents: 16-pixel images


UNET = dict(
    sample_size=SIDE,
    in_channels=4,
    out_channels=4,
    block_out_channels=(8, 16),
    layers_per_block=1,
    norm_num_groups=4,
    attention_head_dim=4,
)


def tiny_unet(num_classes: int = 0) -> diffusers.UNet2DModel:
    return diffusers.UNet2DModel(
        **UNET,
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
    blocks = dict(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
    )
    return diffusers.UNet2DConditionModel(**UNET | blocks | fields)


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


class Oracle(nn.Module):
    """
    Knows which normalised latents `(1, 4, 8, 8)` each class should end in (the last: no class), and predicts the flow
    or the noise that leads there.
    """

    def __init__(self, targets: torch.Tensor, scheduler):
        super().__init__()
        self.targets, self.scheduler = nn.Parameter(targets), scheduler
        self.config, self.device, self.dtype = tiny_unet(len(targets) - 1).config, targets.device, targets.dtype

    def forward(self, sample, timestep, class_labels=None):
        target = self.targets[torch.zeros_like(timestep).long() if class_labels is None else class_labels]
        if isinstance(self.scheduler, FLOW):
            return diffusers.models.unets.unet_2d.UNet2DOutput((sample - target) / (timestep / 1000).view(-1, 1, 1, 1))
        alpha = self.scheduler.alphas_cumprod[timestep.long()].view(-1, 1, 1, 1)
        return diffusers.models.unets.unet_2d.UNet2DOutput((sample - alpha.sqrt() * target) / (1 - alpha).sqrt())


SCHEDULERS = {
    "FlowMatchEulerDiscreteScheduler": {},
    "DDIMScheduler": {"clip_sample": False},
    "DDPMScheduler": {"clip_sample": False},
    "DPMSolverMultistepScheduler": {"final_sigmas_type": "zero"},
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_sampling_ends_where_the_denoiser_points(trained_model, name):
    """With every scheduler, through the normalisation and back."""
    scheduler = getattr(diffusers, name)(**SCHEDULERS[name])
    targets = torch.randn(3, 4, SIDE, SIDE)
    pipeline = own(trained_model, Oracle(targets, scheduler), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline(class_labels=[1, 0], num_inference_steps=10, output_type="latent").images
    factor, shift = trained_model.config.scaling_factor, trained_model.config.shift_factor
    assert (factor, shift) != (1, 0)
    torch.testing.assert_close(latents, targets[[1, 0]] / factor + shift, atol=1e-3, rtol=1e-3)


def test_guidance_extrapolates_from_no_class(trained_model):
    targets = torch.randn(3, 4, SIDE, SIDE)
    scheduler = FLOW()
    pipeline = own(trained_model, Oracle(targets, scheduler), scheduler)
    pipeline.set_progress_bar_config(disable=True)

    def ends(**options):
        latents = pipeline(num_inference_steps=4, output_type="latent", **options).images
        return (latents - trained_model.config.shift_factor) * trained_model.config.scaling_factor

    torch.testing.assert_close(ends(class_labels=1, batch_size=2), targets[[1, 1]], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ends(batch_size=2), targets[[2, 2]], atol=1e-4, rtol=1e-4)
    guided = targets[2] + 3 * (targets[:2] - targets[2])
    torch.testing.assert_close(ends(class_labels=[0, 1], guidance_scale=3.0), guided, atol=1e-4, rtol=1e-4)


@pytest.fixture
def pipeline(trained_model):
    pipeline = own(copy.deepcopy(trained_model), tiny_unet(3), FLOW(), NAMES)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_outputs_of_each_type_agree(pipeline):
    def images(kind):
        torch.manual_seed(0)
        return pipeline(class_labels="dog", num_inference_steps=2, output_type=kind).images

    latents, pt, array, (pil,) = (images(kind) for kind in ("latent", "pt", "np", "pil"))
    assert pt.shape == (1, 3, 16, 16) and 0 <= pt.min() < pt.max() <= 1
    torch.testing.assert_close(pt, (pipeline.vqvae.decode(latents).sample / 2 + 0.5).clamp(0, 1))
    np.testing.assert_array_equal(array[0], pt[0].permute(1, 2, 0).numpy())
    np.testing.assert_array_equal(np.array(pil), (array[0] * 255).round().astype("uint8"))
    torch.manual_seed(0)
    (tensors,) = pipeline(class_labels=1, num_inference_steps=2, output_type="pt", return_dict=False)
    assert torch.equal(tensors, pt)


def test_one_generator_per_image_makes_images_independent_of_their_batch(pipeline):
    pipeline.scheduler = DDPM()  # draws noise at every step

    def images(seeds, labels):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        generator = generators if len(generators) > 1 else generators[0]
        return pipeline(class_labels=labels, num_inference_steps=3, generator=generator, output_type="pt").images

    both = images([5, 6], ["cat", "eel"])
    torch.testing.assert_close(both[1:], images([6], ["eel"]), atol=1e-5, rtol=0)
    assert not torch.allclose(both[:1], both[1:], atol=1e-2)


def test_bfloat16_is_close_to_float32(pipeline):
    options = dict(class_labels=[0, 1], guidance_scale=2.0, num_inference_steps=3, output_type="latent")
    exact = pipeline(generator=torch.manual_seed(0), **options).images
    pipeline.to(torch.bfloat16)
    rounded = pipeline(generator=torch.manual_seed(0), **options).images
    assert pipeline.denoiser.dtype == pipeline.vqvae.dtype == torch.bfloat16
    assert 0 < (rounded - exact).abs().mean() < 0.05 * exact.std()
    assert pipeline(class_labels=0, num_inference_steps=2, output_type="np").images.dtype == np.float32


def test_progress_bar_and_eta(pipeline, capsys):
    pipeline.set_progress_bar_config(disable=False)
    pipeline.scheduler = diffusers.DDIMScheduler(clip_sample=False)
    options = dict(num_inference_steps=3, output_type="latent")
    still = pipeline(generator=torch.manual_seed(0), **options).images
    assert "3/3" in capsys.readouterr().err
    assert torch.equal(pipeline(generator=torch.manual_seed(0), **options).images, still)
    assert not torch.equal(pipeline(generator=torch.manual_seed(0), eta=1.0, **options).images, still)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"output_type": "jpeg"}, "output_type='jpeg' must be one of 'pil', 'np', 'pt', 'latent'"),
        ({"class_labels": ["cat", "cow"]}, r"class_labels \['cow'\]: expected indices from 0 to 2, or their names"),
        ({"class_labels": 3}, r"class_labels \[3\]: expected indices from 0 to 2"),
        ({"guidance_scale": 2.0}, "guidance_scale=2.0 needs class_labels"),
        ({"latents": torch.zeros(1, 4, 4, 4)}, r"latents of shape \(1, 4, 4, 4\): expected \(1, 4, 8, 8\)"),
    ],
)
def test_bad_calls(pipeline, options, message):
    with pytest.raises(ValueError, match=message):
        pipeline(**options)


def test_unconditional_denoisers_take_no_classes(trained_model):
    with pytest.raises(ValueError, match="denoiser is unconditional"):
        own(trained_model, tiny_unet(), FLOW())(class_labels=1)


def test_offloaded_model_is_fetched_by_encode_and_decode():
    """What enable_model_cpu_offload relies on; where to, a GPU, makes no difference to the hooks."""
    model = VQGANModel(VQGANConfig(**TINY)).eval()
    plain = model.decode(model.encode(torch.zeros(1, 3, 16, 16)).latents).sample
    model, hook = cpu_offload_with_hook(model, execution_device="cpu")
    calls = []
    fetch = model._hf_hook.pre_forward
    model._hf_hook.pre_forward = lambda *args, **kwargs: calls.append(1) or fetch(*args, **kwargs)
    assert torch.equal(model.decode(model.encode(torch.zeros(1, 3, 16, 16)).latents).sample, plain)
    assert len(calls) == 2
    hook.offload()


@pytest.fixture(params=["vq_ema", "simvq", "gumbel", "fsq", "residual", "grouped"])
def any_model(request) -> VQGANModel:
    """A model of each way in which quantizers keep their codes."""
    quantizer = request.param
    model = VQGANModel(VQGANConfig(**TINY | {"quantizer": quantizer} | SPECIAL.get(quantizer, {}))).eval()
    for codebook in model.quantize.codebook_parameters():
        torch.nn.init.normal_(codebook, std=0.5)
    return model


@torch.no_grad()
def everything_from(model: VQGANModel) -> list[torch.Tensor]:
    """What a model's methods return, each of them called from outside."""
    latents = model.encode(torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)).latents
    chosen = model.quantize(latents)
    samples = [model.decode(latents).sample, model.decode(latents, force_not_quantize=True).sample]
    return [latents, chosen.quantized, chosen.indices, *samples, model.decode_indices(chosen.indices).sample]


def test_sequential_offloading_reaches_the_codes(any_model):
    """Weights are on the meta device but for the time of a layer's forward pass: reading them at another time fails."""
    expected = everything_from(any_model)
    cpu_offload(any_model, execution_device="cpu")
    assert any_model.encoder.conv_in.weight.device.type == "meta"
    assert all(torch.equal(one, other) for one, other in zip(everything_from(any_model), expected, strict=True))


def test_device_map_with_weights_on_disk(any_model, tmp_path):
    expected = everything_from(any_model)
    any_model.save_pretrained(tmp_path / "model")
    limits = {"cpu": 2 * any_model.get_memory_footprint() // 3}
    model = VQGANModel.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory=limits, offload_folder=tmp_path / "offloaded"
    ).eval()
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    for one, other in zip(everything_from(model), expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "options", [{"offload_type": "leaf_level"}, {"num_blocks_per_group": 1}], ids=["leaf", "block"]
)
def test_group_offloading(any_model, tmp_path, options):
    """To disk, because weights that are there are garbage in memory: on a CPU nothing else would show a wrong read."""
    expected = everything_from(any_model)
    any_model.enable_group_offload("cpu", offload_to_disk_path=str(tmp_path), **options)
    assert all(torch.equal(one, other) for one, other in zip(everything_from(any_model), expected, strict=True))


def test_pipeline_with_group_offloading(pipeline, tmp_path):
    call = dict(class_labels=[0, 1], num_inference_steps=2, output_type="pt")
    expected = pipeline(generator=torch.manual_seed(0), **call).images
    pipeline.enable_group_offload("cpu", offload_type="leaf_level", offload_to_disk_path=str(tmp_path))
    assert torch.equal(pipeline(generator=torch.manual_seed(0), **call).images, expected)


@torch.no_grad()
def test_amused_tokens_decode_to_the_full_range(trained_model):
    """AmusedPipeline clips to [0, 1], its own autoencoder's range; ours is [-1, 1], so decode its tokens instead."""
    torch.manual_seed(0)
    pipeline = amused(trained_model)
    pipeline.set_progress_bar_config(disable=True)
    call = dict(prompt="a cat", num_inference_steps=2)
    tokens = pipeline(**call, generator=torch.manual_seed(0), output_type="latent").images
    clipped = pipeline(**call, generator=torch.manual_seed(0), output_type="pt").images
    sample = trained_model.decode_indices(tokens).sample
    assert sample.min() < -0.1
    assert torch.equal(clipped, sample.clip(0, 1))
