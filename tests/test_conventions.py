"""
What users of transformers and diffusers take for granted of any model, for every quantizer on both backbones: the
conventions that the two libraries' own common tests hold their models to.
"""

import copy
import inspect
import pickle

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from conftest import SPECIAL, TINY
from diffusers.hooks import apply_layerwise_casting
from diffusers.training_utils import EMAModel
from test_pipelines import everything_from, tiny_unet
from torch import nn
from transformers import AutoConfig, AutoModel, Trainer, TrainingArguments

from hf_vqgan import QUANTIZERS, VQGANConfig, VQGANLatentDiffusionPipeline, VQGANModel

BACKBONES = {"vqgan": {}, "maskgit": {"backbone": "maskgit", "latent_channels": 4}}
CASES = [(quantizer, backbone) for backbone in BACKBONES for quantizer in QUANTIZERS]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def config_of(quantizer: str = "vq", backbone: str = "vqgan", **fields) -> VQGANConfig:
    return VQGANConfig(**TINY | {"quantizer": quantizer} | SPECIAL.get(quantizer, {}) | BACKBONES[backbone] | fields)


def model_of(config: VQGANConfig) -> VQGANModel:
    model = VQGANModel(config).eval()
    with torch.no_grad():  # codes that are far enough apart for rounding not to swap them
        for codebook in model.quantize.codebook_parameters():
            codebook.normal_(std=0.5)
    return model


@pytest.fixture(params=CASES, ids="-".join)
def config(request) -> VQGANConfig:
    return config_of(*request.param)


@pytest.fixture
def model(config) -> VQGANModel:
    return model_of(config)


@pytest.fixture(params=BACKBONES)
def plain_model(request) -> VQGANModel:
    """One quantizer is enough where quantizers make no difference."""
    return model_of(config_of("vq", request.param))


def dtypes_of(model: nn.Module) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in model.state_dict().items()}


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


def assert_same_output(one, other, **tolerance) -> None:
    """Tensors, and whatever nests them."""
    if torch.is_tensor(one):
        torch.testing.assert_close(one, other, **tolerance)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        assert_same_output(tuple(one.values()), tuple(other.values()), **tolerance)
    else:
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same_output(a, b, **tolerance)


def training_gradients(model: VQGANModel, pixels: torch.Tensor) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    torch.manual_seed(0)  # for quantizers that draw
    output = model.train()(pixels)
    (output.sample - pixels).square().mean().add(sum(output.losses.values())).backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}


# Loading and saving


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_saved_model_comes_back_whole(tmp_path, model, pixels, dtype):
    model.to(dtype).save_pretrained(tmp_path)
    loaded, report = VQGANModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert_same_state(loaded, model)
    assert not loaded.training and loaded.dtype == dtype
    if dtype in (
        torch.float32,
        torch.float64,
    ):  # weights elsewhere in memory: the last bit may differ, and codes with it
        assert_same_output(loaded(pixels), model(pixels), rtol=1e-4, atol=1e-5)


def test_shards_come_back_whole(tmp_path, model):
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_same_state(AutoModel.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_all_ways_of_casting_agree(tmp_path, quantizer, dtype):
    """Moving averages are in float32 or better, whichever way a model comes to its dtype; all else is in that dtype."""
    config = config_of(quantizer)
    model = VQGANModel(config)
    model.save_pretrained(tmp_path)
    short = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.float16: "half", torch.float64: "double"}[dtype]
    ways = [
        VQGANModel(config).to(dtype),
        VQGANModel(config).to("cpu", dtype),
        getattr(VQGANModel(config), short)(),
        VQGANModel(config).half().to(dtype),
        VQGANModel(config).double().to(dtype),
        VQGANModel._from_config(copy.deepcopy(config), dtype=dtype),
        AutoModel.from_config(copy.deepcopy(config), dtype=dtype),
        VQGANModel.from_pretrained(tmp_path, dtype=dtype),
        AutoModel.from_pretrained(tmp_path, dtype=str(dtype).removeprefix("torch.")),
        AutoModel.from_pretrained(tmp_path, torch_dtype=dtype),
    ]
    averages = ("cluster_size", "embed_avg")
    wide = torch.promote_types(dtype, torch.float32)
    expected = {name: wide if name.endswith(averages) else dtype for name in model.state_dict()}
    for way in ways:
        assert dtypes_of(way) == expected
        assert way.dtype == dtype
    assert config.quantizer != "vq_ema" or any(name.endswith(averages) for name in expected)


def test_averages_of_composites_stay_in_float32(tmp_path):
    model = VQGANModel(config_of("residual", base_quantizer="vq_ema")).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert_same_state(VQGANModel.from_pretrained(tmp_path), model)
    assert model.quantize.parts[2].embed_avg.dtype == torch.float32


def test_layers_kept_in_float32_are_there(model):
    kept = model._keep_in_fp32_modules_strict
    assert bool(kept) == (model.config.quantizer == "vq_ema")
    assert all(any(name in key for key in model.state_dict()) for name in kept)


def test_layers_that_stay_together_are_there(plain_model):
    kinds = {type(module).__name__ for module in plain_model.modules()}
    assert kinds & plain_model._no_split_modules


def test_weights_missing_from_a_file_are_drawn(config):
    """Models are made on the meta device when they are loaded: what no file and no rule fills is garbage."""
    loaded = VQGANModel.from_pretrained(None, config=config, state_dict={})
    fresh = VQGANModel(config)
    for name, expected in fresh.state_dict().items():
        tensor = loaded.state_dict()[name]
        assert tensor.device.type == "cpu" and tensor.isfinite().all()
        assert tensor.float().abs().max() <= 8 * expected.float().abs().max().clamp(min=1e-3), name
        if expected.float().std(correction=0) == 0:  # ones and zeros
            assert torch.equal(tensor, expected), name


QUANTIZER_KEYS = {
    "vq": {"embedding.weight"},
    "vq_ema": {"embedding.weight", "cluster_size", "embed_avg"},
    "simvq": {"embedding.weight", "projection.weight"},
    "ibq": {"embedding.weight"},
    "gumbel": {"proj.weight", "proj.bias", "embed.weight"},
    "fsq": set(),
    "lfq": set(),
    "bsq": set(),
    "residual": {f"parts.{number}.embedding.weight" for number in range(3)},
    "grouped": {f"parts.{number}.embedding.weight" for number in range(2)},
}


def test_names_in_a_state_dict_stay(model):
    """They are in published files. On the vqgan backbone they are those of diffusers' VQModel."""
    names = set(model.state_dict())
    own = {f"quantize.{name}" for name in QUANTIZER_KEYS[model.config.quantizer]}
    assert {name for name in names if name.startswith("quantize.")} == own
    if model.config.backbone == "vqgan":
        fields = {name: getattr(model.config, name) for name in VQGANModel(config_of()).diffusers_parts()[0]}
        assert names - own == set(diffusers.VQModel(**fields).state_dict()) - {"quantize.embedding.weight"}
    else:
        assert len(names - own) == 51 and "decoder.up_blocks.0.upsamplers.0.conv.weight" in names


def test_copies_and_pickles(model, pixels):
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_state(again, model)
        assert again.config == model.config
        with torch.no_grad():
            assert_same_output(again(pixels), model(pixels), rtol=0, atol=0)


def test_a_config_survives_every_way_out_and_in(tmp_path, config):
    config.save_pretrained(tmp_path)
    (tmp_path / "all.json").write_text(config.to_json_string(use_diff=False))
    for again in (
        VQGANConfig.from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path),
        VQGANConfig.from_dict(config.to_dict()),
        VQGANConfig.from_dict(config.to_diff_dict()),
        VQGANConfig.from_json_file(tmp_path / "all.json"),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
    ):
        assert again.to_dict() == config.to_dict() | {"_name_or_path": again.name_or_path}
        assert type(again.block_out_channels) is tuple


# Calling


def test_signature(plain_model):
    names = list(inspect.signature(plain_model.forward).parameters)
    assert names[0] == plain_model.main_input_name == "pixel_values"
    assert {"return_dict", "output_hidden_states", "output_attentions"} <= set(names)


@torch.no_grad()
def test_evaluation_is_deterministic(model, pixels):
    first = model(pixels)
    torch.manual_seed(1)
    assert_same_output(model(pixels), first, rtol=0, atol=0)


@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(model, pixels):
    batch = model(pixels)
    for number in range(len(pixels)):
        alone = model(pixels[number : number + 1])
        assert torch.equal(alone.indices[0], batch.indices[number])
        torch.testing.assert_close(alone.sample[0], batch.sample[number], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_tuples_and_dicts_hold_the_same(model, pixels):
    for hidden in (False, True):
        named = model(pixels, output_hidden_states=hidden)
        assert_same_output(model(pixels, output_hidden_states=hidden, return_dict=False), named.to_tuple())
        assert ("hidden_states" in named) == hidden
    model.config.return_dict, model.config.output_hidden_states = False, True
    assert_same_output(model(pixels), named.to_tuple())
    assert_same_output(model(pixels, return_dict=True), named)
    assert set(model(pixels, return_dict=True, output_hidden_states=False)) == {
        "sample",
        "latents",
        "indices",
        "losses",
    }
    assert model.encode(pixels).latents.shape == named.latents.shape  # diffusers' methods know no config.return_dict


def test_hidden_states_are_the_features_on_the_way(plain_model, pixels):
    states = plain_model(pixels, output_hidden_states=True).hidden_states
    maskgit = plain_model.config.backbone == "maskgit"
    encoder = [(8, 16, 24), (16, 8, 12)] if maskgit else [(8, 8, 12), (16, 8, 12)]
    assert [tuple(state.shape[1:]) for state in states] == [
        *encoder, (16, 8, 12), (16, 8, 12), (16, 16, 24), (8, 16, 24)
    ]  # fmt: skip
    gradients = torch.autograd.grad(plain_model(pixels, output_hidden_states=True).hidden_states[2].sum(),
                                    plain_model.encoder.parameters(), allow_unused=True)  # fmt: skip
    assert gradients[0] is not None
    assert not plain_model.encoder.mid_block._forward_hooks


def test_what_cannot_be_returned_is_refused(plain_model, pixels):
    with pytest.raises(ValueError, match="output_attentions=True: .* keep no weights"):
        plain_model(pixels, output_attentions=True)
    plain_model(pixels, output_attentions=False)
    plain_model.enable_slicing()
    with pytest.raises(ValueError, match=r"output_hidden_states=True .*disable_slicing\(\)"):
        plain_model(pixels, output_hidden_states=True)
    with pytest.raises(TypeError, match="labels"):
        plain_model(pixels, labels=torch.zeros(2))


@torch.no_grad()
def test_parts(model, pixels):
    whole = model(pixels)
    model.enable_slicing()
    assert_same_output(model(pixels), whole, atol=1e-5, rtol=1e-5)
    model.enable_tiling(tile_sample_min_size=8)
    assert model(pixels).sample.shape == pixels.shape
    model.disable_slicing()
    model.disable_tiling()
    assert_same_output(model(pixels), whole, rtol=0, atol=0)


def test_sizes(model):
    numbers = [weight.numel() for weight in model.parameters()]
    assert model.num_parameters() == sum(numbers)
    learned = [weight.numel() for weight in model.parameters() if weight.requires_grad]
    assert model.num_parameters(only_trainable=True) == sum(learned)
    bytes_of = [t.numel() * t.element_size() for t in model.state_dict().values()]
    assert model.get_memory_footprint() == sum(bytes_of)


# Training


def test_all_that_can_learn_gets_a_gradient(model, pixels):
    gradients = training_gradients(model, pixels)
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    assert model.training and not model.eval().quantize.training


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_gradient_checkpointing_changes_no_gradient(model, pixels, reentrant):
    plain = {name: gradient.clone() for name, gradient in training_gradients(model, pixels).items()}
    assert model.supports_gradient_checkpointing
    # transformers renames gradient checkpointing
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    calls = []
    model.decoder.up_blocks[0].resnets[0].register_forward_pre_hook(lambda *_: calls.append(1))
    assert_same_output(training_gradients(model, pixels), plain)
    assert len(calls) == 2  # once forward, once again for the backward pass
    getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()
    assert_same_output(training_gradients(model, pixels), plain)
    assert len(calls) == 3


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_hooks_fire_on_every_layer(plain_model, pixels, training):
    """Forward, before it and backward, as tools for features, pruning, profiling and debugging set them."""
    plain_model.train(training)
    called = {"before": set(), "after": set(), "backward": set()}
    layers = {
        name: layer
        for name, layer in plain_model.named_modules()
        if not name.startswith("quantize") and not list(layer.children()) and not isinstance(layer, nn.ModuleList)
    }
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda *_, name=name: called["before"].add(name))
        layer.register_forward_hook(lambda *_, name=name: called["after"].add(name))
        layer.register_full_backward_hook(lambda *_, name=name: called["backward"].add(name))
    plain_model(pixels.requires_grad_(), force_not_quantize=True).sample.sum().backward()
    # Some layers are never called, in stock models either: attention's dropout of nothing.
    assert called["before"] == called["after"] == called["backward"]
    missed = layers.keys() - called["after"]
    assert not any(list(layers[name].parameters()) for name in missed), missed
    assert not any(isinstance(layers[name], nn.SiLU) for name in missed), missed


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's
def test_adapters_on_every_convolution(plain_model, pixels):
    """LoRA: nothing changes at first, everything that is wrapped learns, and merging changes nothing."""
    peft = pytest.importorskip("peft")
    with torch.no_grad():
        before = plain_model(pixels).sample
    names = [name for name, layer in plain_model.named_modules() if isinstance(layer, nn.Conv2d)]
    assert any("upsamplers" in name for name in names)
    wrapped = peft.get_peft_model(plain_model.train(), peft.LoraConfig(r=2, target_modules=names))
    torch.testing.assert_close(wrapped(pixels).sample, before)
    optimizer = torch.optim.SGD([weight for weight in wrapped.parameters() if weight.requires_grad], lr=0.1)
    for _ in range(2):  # one half of an adapter starts at 0, and holds the other back at the first step
        optimizer.zero_grad()
        (wrapped(pixels).sample - pixels).square().mean().backward()
        optimizer.step()
    learned = {name for name, weight in wrapped.named_parameters() if weight.grad is not None and weight.grad.any()}
    for name in names:
        assert any(name in key and "lora_A" in key for key in learned), name
    wrapped.eval()
    with torch.no_grad():
        after = wrapped(pixels).sample
        assert not torch.allclose(after, before)
        merged = wrapped.merge_and_unload()
        torch.testing.assert_close(merged(pixels).sample, after, atol=1e-4, rtol=1e-4)


def test_averages_of_weights(model):
    """diffusers' EMAModel follows, stores and restores the codebook as well, be it learned by gradient or not."""
    before = [weight.clone() for weight in model.parameters()]
    average = EMAModel(model.parameters(), decay=0.5)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1)
    average.step(model.parameters())
    average.step(model.parameters())  # the first step has decay 0
    average.store(model.parameters())
    average.copy_to(model.parameters())
    learned = [weight.requires_grad for weight in model.parameters()]
    for weight, start in zip(model.parameters(), before, strict=True):
        assert (weight > start).all()
    average.restore(model.parameters())
    assert_same_output([weight - 1 for weight in model.parameters()], before, atol=1e-6, rtol=1e-5)
    assert [weight.requires_grad for weight in model.parameters()] == learned


# transformers' own trainer


class Images(torch.utils.data.Dataset):
    def __init__(self, **others):
        self.pixels, self.others = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1, others

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, number):
        return {"pixel_values": self.pixels[number], **self.others}


class AutoencoderTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        output = model(**inputs)
        loss = (output.sample - inputs["pixel_values"]).square().mean() + sum(output.losses.values())
        return (loss, output) if return_outputs else loss


def trainer_of(model: VQGANModel, folder, dataset=None, kind=AutoencoderTrainer, **options) -> Trainer:
    defaults = dict(
        output_dir=str(folder), per_device_train_batch_size=4, per_device_eval_batch_size=4, max_steps=4,
        learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True, save_steps=2, eval_steps=2,
        eval_strategy="steps", load_best_model_at_end=True, label_names=["pixel_values"], dataloader_pin_memory=False,
    )  # fmt: skip
    dataset = dataset or Images()
    return kind(model, TrainingArguments(**defaults | options), train_dataset=dataset, eval_dataset=dataset)


@pytest.mark.filterwarnings("ignore:.*(grad_checkpoint|gradient_checkpointing).*:FutureWarning")
@pytest.mark.parametrize(
    "options", [{}, {"bf16": True}, {"gradient_checkpointing": True}], ids=["", "bf16", "checkpoint"]
)
def test_transformers_trainer(tmp_path, plain_model, options):
    """Training, evaluation, prediction, the best checkpoint, resuming; what it saves loads without a word."""
    start = copy.deepcopy(plain_model)
    trainer = trainer_of(plain_model, tmp_path, **options)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < 0.9 * before
    predicted = trainer.predict(Images()).predictions
    assert predicted[0].shape == (8, 3, 16, 16) and set(predicted[3]) == {"commitment", "codebook"}
    trainer.save_model(tmp_path / "final")
    for name in ("final", "checkpoint-4"):
        assert_same_state(VQGANModel.from_pretrained(tmp_path / name), trainer.model.cpu())
        assert_same_state(AutoModel.from_pretrained(tmp_path / name), trainer.model)

    resumed = trainer_of(start, tmp_path / "again", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_output(resumed.model.state_dict(), trainer.model.state_dict(), rtol=1e-4, atol=1e-5)


def test_what_trainer_must_not_swallow(tmp_path, plain_model):
    """A column that the model does not know is an error that names it, and a missing loss is Trainer's to report."""
    with pytest.raises(TypeError, match="unexpected keyword argument 'labels'"):
        trainer_of(plain_model, tmp_path, Images(label=1)).train()
    with pytest.raises(ValueError, match="did not return a loss"):
        trainer_of(plain_model, tmp_path, kind=Trainer).train()


# What compilers see


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_compiled_in_one_graph(training, pixels):
    model = model_of(config_of("vq", "maskgit"))
    expected = training_gradients(model, pixels) if training else model(pixels)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got = training_gradients(compiled, pixels) if training else compiled(pixels)
    got = {name.removeprefix("_orig_mod."): tensor for name, tensor in got.items()}
    assert_same_output(got, dict(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")  # tracing itself is one
@torch.no_grad()
def test_traced(plain_model, pixels):
    expected = plain_model(pixels)
    plain_model.config.return_dict = False
    traced = torch.jit.trace(plain_model, (pixels,), strict=False)
    assert_same_output(traced(pixels)[:3], expected.to_tuple()[:3])


@torch.no_grad()
def test_exported(plain_model, pixels):
    exported = torch.export.export(plain_model, (pixels,), strict=False).module()
    assert_same_output(tuple(exported(pixels).values())[:3], plain_model(pixels).to_tuple()[:3])


# Where weights live, and as what


def low_memory(model: VQGANModel, how: str, compute: torch.dtype) -> None:
    """Weights of one byte, by the model's method or by diffusers' function without any exception but the usual ones."""
    if how == "method":
        model.enable_layerwise_casting(torch.float8_e4m3fn, compute)
    else:
        apply_layerwise_casting(model, torch.float8_e4m3fn, compute)


@torch.no_grad()
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["method", "function"])
def test_layerwise_casting(model, pixels, how, compute):
    """Weights rest in one dtype and compute in another, which is the one that the model speaks of and answers in."""
    expected = everything_from(copy.deepcopy(model).to(compute))
    low_memory(model, how, compute)
    assert model.dtype == compute
    stored = dtypes_of(model)
    assert stored["encoder.conv_in.weight"] == torch.float8_e4m3fn
    assert stored["encoder.down_blocks.0.resnets.0.norm1.weight"] == (compute if how == "method" else torch.float32)
    results = everything_from(model)
    assert [t.dtype for t in results] == [t.dtype for t in expected]
    error = (results[0] - expected[0]).float().norm() / expected[0].float().norm()
    assert 0 < error < 0.3
    assert model(pixels).sample.dtype == compute
    assert dtypes_of(model) == stored  # back at rest


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
def test_layerwise_casting_in_a_pipeline(compute):
    """Autoencoder and denoiser: the pipeline must make latents of the dtype that they compute in."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipeline = VQGANLatentDiffusionPipeline(model_of(config_of()), tiny_unet(3).to(compute), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    call = dict(class_labels=[0, 1], guidance_scale=2.0, num_inference_steps=2, output_type="pt")
    expected = pipeline(**call, generator=torch.manual_seed(0)).images
    low_memory(pipeline.vqvae, "method", compute)
    pipeline.denoiser.enable_layerwise_casting(torch.float8_e4m3fn, compute)
    images = pipeline(**call, generator=torch.manual_seed(0)).images
    assert images.shape == expected.shape and images.isfinite().all()
    assert 0 < (images - expected).abs().mean() < 0.2


def test_offloading(tmp_path, model):
    """By Accelerate's hooks, and by diffusers' groups of layers."""
    expected = everything_from(model)
    grouped = copy.deepcopy(model)
    grouped.enable_group_offload("cpu", offload_to_disk_path=str(tmp_path), offload_type="leaf_level")
    assert_same_output(everything_from(grouped), expected, rtol=0, atol=0)
    cpu_offload(model, execution_device="cpu")
    assert_same_output(everything_from(model), expected, rtol=0, atol=0)


def test_device_map(tmp_path, model):
    """As many layers in memory as are allowed there, the others on disk."""
    expected = everything_from(model)
    limits = {"cpu": 2 * model.get_memory_footprint() // 3}
    model.save_pretrained(tmp_path)
    loaded = VQGANModel.from_pretrained(
        tmp_path, device_map="auto", max_memory=limits, offload_folder=tmp_path / "disk"
    )
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    assert_same_output(everything_from(loaded), expected, atol=1e-5, rtol=1e-5)
