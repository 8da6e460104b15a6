"""The fast blocks, against stock blocks and autograd."""

import copy

import pytest
import torch
import torch.nn.functional as F
from benchmarks.speed import count_gflop
from benchmarks.textbook_steps import use_plain_blocks
from conftest import TINY
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.nn.utils import parametrizations, prune

from hf_vqgan import VQGANConfig, VQGANModel
from hf_vqgan.blocks import UpsamplingBlock
from hf_vqgan.modeling_maskgit import MaskGitResnetBlock
from hf_vqgan.training.configuration import VQGANTrainingConfig
from hf_vqgan.training.fast_blocks import (
    FAST_BLOCKS,
    FastMaskGitResnetBlock,
    FastResnetBlock,
    _NormSiLUConv,
    install_fast_blocks,
    norm_act_conv,
)
from hf_vqgan.training.networks import build_model

LAYOUTS = (torch.contiguous_format, torch.channels_last)


def blocks(out_channels: int = 16, activation: str = "silu") -> tuple[FastResnetBlock, ResnetBlock2D]:
    """Ours and diffusers', with the same weights, float64."""
    torch.manual_seed(0)
    plain = ResnetBlock2D(in_channels=16, out_channels=out_channels, temb_channels=None, groups=4, eps=1e-6,
                          non_linearity=activation).double()  # fmt: skip
    for norm in (plain.norm1, plain.norm2):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    ours = install_fast_blocks(copy.deepcopy(plain))
    assert type(ours) is FastResnetBlock
    return ours, plain


def gradients(block: nn.Module, x: torch.Tensor, direction: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Output, and gradients at the input and all parameters."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    out = block(x, None)
    return out, *torch.autograd.grad(out, (x, *block.parameters()), direction.to(out.dtype))


@pytest.mark.parametrize("shape", [(3, 16, 5, 6), (1, 16, 4, 1), (2, 16, 1, 1)], ids=str)
@pytest.mark.parametrize("out_channels", [16, 24])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_same_values_and_gradients(layout, out_channels, shape):
    ours, plain = (block.to(memory_format=layout) for block in blocks(out_channels))
    x = (torch.randn(shape, dtype=torch.float64) * 2 + 3).contiguous(memory_format=layout)
    direction = torch.randn(shape[0], out_channels, *shape[2:], dtype=torch.float64)
    for one, other in zip(gradients(ours, x, direction), gradients(plain, x, direction), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert ours(x).is_contiguous(memory_format=layout)
    torch.testing.assert_close(ours.eval()(x), plain.eval()(x, None), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_mixed_precision_is_off_by_rounding_alone(layout):
    ours, plain = blocks(24)
    x = (torch.randn(4, 16, 16, 16) * 2 + 3).contiguous(memory_format=layout)
    direction = torch.randn(4, 24, 16, 16)
    exact = gradients(plain, x.double(), direction.double())
    ours, separate = (block.float().to(memory_format=layout) for block in (ours, copy.deepcopy(plain)))
    with torch.autocast("cpu", torch.bfloat16):
        got, usual = gradients(ours, x, direction), gradients(separate, x, direction)
    assert [t.dtype for t in got] == [t.dtype for t in usual]
    for one, other, wanted in zip(got, usual, exact, strict=True):
        error, usual_error = ((t.double() - wanted).norm() / wanted.norm() for t in (one, other))
        assert error < max(2 * usual_error, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whole_block_in_one_precision(dtype):
    ours, plain = blocks(24)
    x, direction = torch.randn(2, 16, 8, 8), torch.randn(2, 24, 8, 8)
    for one, other in zip(
        gradients(ours.to(dtype), x.to(dtype), direction), gradients(plain, x.double(), direction), strict=True
    ):
        assert one.dtype == dtype
        assert (one.double() - other).norm() < 8 * torch.finfo(dtype).eps * other.norm()


def test_frozen_parameters_get_no_gradient():
    """A frozen block passes the gradient on; what is not frozen in a block learns."""
    for frozen in ("norm1", "conv1", ""):
        ours, plain = blocks()
        for block in (ours, plain):
            getattr(block, frozen).requires_grad_(False) if frozen else block.requires_grad_(False)
        inputs = [torch.ones(1, 16, 4, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        (ours(inputs[0]).square().sum() + plain(inputs[1], None).square().sum()).backward()
        pairs = zip((*ours.parameters(), inputs[0]), (*plain.parameters(), inputs[1]), strict=True)
        for one, other in pairs:
            assert (one.grad is None) == (other.grad is None)
            assert one.grad is None or torch.allclose(one.grad, other.grad, rtol=1e-9, atol=1e-9)
    x = torch.randn(1, 16, 4, 4, dtype=torch.float64)
    ours, _ = blocks()
    ours(x).sum().backward()  # the input, as an image, needs none
    assert ours.conv1.weight.grad is not None


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_numerical_gradients_of_one_half(layout):
    norm, conv = nn.GroupNorm(2, 4).double(), nn.Conv2d(4, 3, 3, padding=1).double()
    small = torch.randn(2, 4, 2, 3, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    weights = [nn.init.normal_(p.detach()).requires_grad_() for p in (norm.weight, norm.bias, conv.weight, conv.bias)]

    def function(x, *weights):
        return _NormSiLUConv.apply(x, *weights, 2, 1e-6, (1, 1), (1, 1), (1, 1), 1)

    assert torch.autograd.gradcheck(function, (small, *weights))


def test_second_derivatives():
    """In evaluation, as the latent analysis takes them; in training, where nothing needs them, they are refused."""
    ours, plain = blocks(24)
    x = torch.randn(2, 16, 3, 4, dtype=torch.float64).requires_grad_()

    def penalty(block):
        (at_x,) = torch.autograd.grad(block(x, None).square().sum(), x, create_graph=True)
        return torch.autograd.grad(at_x.square().sum(), x)[0]

    torch.testing.assert_close(penalty(ours.eval()), penalty(plain.eval()), rtol=1e-9, atol=1e-9)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        penalty(ours.train())


def test_maskgit_blocks_have_the_same_values_and_gradients():
    torch.manual_seed(0)
    for out_channels in (8, 12):
        plain = MaskGitResnetBlock(8, out_channels, 4, nn.SiLU()).double()
        ours = install_fast_blocks(copy.deepcopy(plain))
        assert type(ours) is FastMaskGitResnetBlock
        x = torch.randn(2, 8, 4, 6, dtype=torch.float64, requires_grad=True)
        results = []
        for block in (ours, plain):
            out = block(x)
            results.append((out, *torch.autograd.grad(out.pow(3).sum(), (x, *block.parameters()))))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_two_tensors_are_kept():
    ours, _ = blocks()
    x, kept = torch.randn(2, 16, 8, 8, dtype=torch.float64, requires_grad=True), set()

    def note(tensor):
        kept.add((tensor.data_ptr(), tensor.numel()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        ours(x)
    assert sum(size == x.numel() for _, size in kept) == 2


def test_other_activations_and_convolutions_go_their_own_way():
    """A convolution that somebody has replaced, by an adapter say, is called and not looked into."""
    ours, plain = blocks(activation="relu")
    x = torch.randn(1, 16, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(ours(x), plain(x, None), rtol=1e-12, atol=1e-12)

    class Doubled(nn.Conv2d):
        def forward(self, hidden):
            return 2 * super().forward(hidden)

    norm, conv = nn.GroupNorm(2, 4), Doubled(4, 4, 3)
    x = torch.randn(1, 4, 4, 4)
    torch.testing.assert_close(norm_act_conv(x, norm, nn.SiLU(), conv), conv(F.silu(norm(x))))


def own_forward(layer: nn.Module) -> None:
    layer.forward = lambda x: 2 * type(layer).forward(layer, x)


def write_weights(layer: nn.Module, inputs) -> None:
    layer.weight.data.fill_(1)


# What others do to the layers of a block
INTERVENTIONS = {
    "spectral_norm": lambda block: parametrizations.spectral_norm(block.conv1),
    "weight_norm": lambda block: parametrizations.weight_norm(block.conv1),
    "prune": lambda block: prune.l1_unstructured(block.conv1, "weight", amount=0.5),
    "seamless": lambda block: setattr(block.conv1, "padding_mode", "circular"),
    "dropout": lambda block: setattr(block.dropout, "p", 0.5),
    "adapter": lambda block: setattr(block, "conv1", nn.Sequential(block.conv1, nn.Tanh())),
    "forward": lambda block: own_forward(block.conv1),
    "weights": lambda block: block.conv1.register_forward_pre_hook(write_weights),
    "input": lambda block: block.conv1.register_forward_pre_hook(lambda _, inputs: inputs[0] + 1),
    "output": lambda block: block.norm1.register_forward_hook(lambda _, inputs, out: out.sin()),
    "activation": lambda block: block.nonlinearity.register_forward_hook(lambda _, inputs, out: out.sin()),
    "gradient": lambda block: block.norm2.register_full_backward_hook(lambda _, at_x, at_out: (2 * at_x[0],)),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", INTERVENTIONS)
def test_interventions_into_residual_blocks_take_effect(name, training):
    x = torch.randn(2, 16, 6, 6, dtype=torch.float64)
    results = []
    for block in blocks():
        block.train(training)
        torch.manual_seed(0)  # spectral_norm and dropout draw
        INTERVENTIONS[name](block)
        results.append(gradients(block, x, torch.linspace(-1, 1, x.numel()).view(x.shape)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    if training or name != "dropout":  # the test can fail
        untouched = gradients(blocks()[1], x, torch.linspace(-1, 1, x.numel()).view(x.shape))
        assert not all(torch.allclose(*pair) for pair in zip(untouched[:2], results[1][:2], strict=True)) or name in (
            "weight_norm",  # is another way to write the same weights
        )


def watch(block: nn.Module, backward: bool) -> dict[tuple[str, str], list[torch.Tensor]]:
    """What hooks on each layer of `block` are going to keep."""
    kept: dict[tuple[str, str], list[torch.Tensor]] = {}

    def keep(name, what, tensors):
        kept.setdefault((name, what), []).extend(tensors)

    for name, layer in block.named_children():
        layer.register_forward_pre_hook(lambda _, inputs, name=name: keep(name, "input", inputs))
        layer.register_forward_hook(lambda _, inputs, out, name=name: keep(name, "output", [out]))
        if backward:
            layer.register_full_backward_hook(
                lambda _, at_x, at_out, name=name: keep(name, "gradients", (*at_x, *at_out))
            )
    return kept


@pytest.mark.parametrize("mode", ["training", "evaluation", "no_grad"])
def test_hooks_see_what_they_would_see_in_a_stock_block(mode):
    """On every layer, forward, before it and backward; and what a hook has kept stays as it was."""
    seen = []
    for block in blocks(24):
        seen.append(watch(block.train(mode == "training"), backward=mode != "no_grad"))
        x = torch.linspace(-3, 3, 2 * 16 * 4 * 4, dtype=torch.float64).view(2, 16, 4, 4).requires_grad_()
        with torch.set_grad_enabled(mode != "no_grad"):
            out = block(x, None)
        if mode != "no_grad":
            out.pow(2).sum().backward()
    ours, plain = seen
    assert ours.keys() == plain.keys() and ("norm1", "output") in plain
    for place, tensors in plain.items():
        for one, other in zip(ours[place], tensors, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_hooks_on_all_modules_are_called():
    """As profilers set them: on every module there is, without touching any."""
    counts = []
    for block in blocks():
        called = []
        handle = nn.modules.module.register_module_forward_hook(lambda module, *_, to=called: to.append(type(module)))
        try:
            block(torch.ones(1, 16, 4, 4, dtype=torch.float64), None)
        finally:
            handle.remove()
        counts.append(sorted(kind.__name__ for kind in called[:-1]))
    assert counts[0] == counts[1] and "GroupNorm" in counts[0]


@pytest.fixture
def summed_weights(monkeypatch):
    """Weights are summed however few pixels there are."""
    monkeypatch.setattr("hf_vqgan.blocks.MIN_PIXELS", 0)


def upsampling_blocks() -> tuple[UpsamplingBlock, Upsample2D]:
    """Ours and diffusers', with the same weights, float64."""
    torch.manual_seed(0)
    plain = Upsample2D(6, use_conv=True, out_channels=4).double()
    ours = copy.deepcopy(plain)
    ours.__class__ = UpsamplingBlock
    return ours, plain


@pytest.mark.parametrize("shape", [(2, 6, 5, 7), (1, 6, 1, 4), (3, 6, 1, 1)], ids=str)
@pytest.mark.parametrize("min_pixels", [0, 10**6], ids=["summed weights", "few pixels"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_upsampling_has_the_same_values_and_derivatives(monkeypatch, layout, min_pixels, shape):
    """Up to the second, edges and corners included."""
    monkeypatch.setattr("hf_vqgan.blocks.MIN_PIXELS", min_pixels)
    ours, plain = (block.to(memory_format=layout) for block in upsampling_blocks())
    x = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    direction = torch.randn(shape[0], 4, 2 * shape[2], 2 * shape[3], dtype=torch.float64)
    results = []
    for block in (ours, plain):
        out = block(x)
        first = torch.autograd.grad(out, (x, *block.parameters()), direction * out.detach(), create_graph=True)
        (at_x,) = torch.autograd.grad(block(x).pow(3).sum(), x, create_graph=True)
        second = torch.autograd.grad(at_x.square().sum(), (x, *block.parameters()))
        results.append((out, *first, *second))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert ours(x).is_contiguous(memory_format=layout) or shape[2:] == (1, 1)


@pytest.mark.parametrize("mixed", [False, True], ids=["bfloat16", "mixed precision"])
def test_upsampling_in_half_precision_is_off_by_rounding_alone(summed_weights, mixed):
    ours, plain = upsampling_blocks()
    dtype = torch.float32 if mixed else torch.bfloat16
    ours, separate = ours.to(dtype), copy.deepcopy(plain).to(dtype)
    x = torch.randn(2, 6, 16, 16).to(dtype)
    exact = plain(x.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        got, usual = ours(x), separate(x)
    assert got.dtype == usual.dtype == torch.bfloat16
    error, usual_error = ((out.double() - exact).norm() for out in (got, usual))
    assert error < 2 * usual_error


def test_no_enlarged_image_is_made(summed_weights):
    ours, plain = upsampling_blocks()
    x, kept = torch.randn(2, 6, 8, 8, dtype=torch.float64, requires_grad=True), []

    def note(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        ours(x)
        assert 4 * x.numel() not in kept
        plain(x)  # the test can fail
        assert 4 * x.numel() in kept
    few, many = (count_gflop(lambda block=block: block(x)) for block in (ours, plain))
    assert few / many == pytest.approx(16 / 36)


def test_whoever_wraps_an_upsampling_convolution_is_called(summed_weights):
    """As offloading does, which has a convolution's weights only while it runs."""
    ours, plain = upsampling_blocks()

    def fetch(conv, inputs):
        conv.to(torch.float64)

    ours.conv.register_forward_pre_hook(fetch)
    x = torch.randn(1, 6, 4, 4, dtype=torch.float64)
    ours.conv.to(torch.float16)
    plain.to(torch.float16).to(torch.float64)
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-9, atol=1e-9)


def test_a_model_in_half_precision_is_equal_to_the_bit():
    """In eval mode, with fewer pixels than upsampling sums weights for: same operators, same order, same layouts."""
    model = VQGANModel(VQGANConfig(**TINY)).eval().bfloat16()
    plain = copy.deepcopy(model)
    use_plain_blocks(plain)
    x = torch.randn(1, 3, 16, 16, dtype=torch.bfloat16)
    with torch.no_grad():
        latents = model.encode(x).latents
        assert torch.equal(latents, plain.encode(x).latents)
        assert torch.equal(*(m.decode(latents, force_not_quantize=True).sample for m in (model, plain)))


@pytest.mark.parametrize("backbone", ["vqgan", "maskgit"])
def test_the_trainer_replaces_every_residual_block_and_a_loaded_model_has_none(tmp_path, backbone):
    """Otherwise a new release of diffusers could quietly take the savings away."""
    fields = (
        TINY | {"backbone": backbone} | ({"latent_channels": 4, "vq_embed_dim": 4} if backbone == "maskgit" else {})
    )
    config = VQGANTrainingConfig(dataset_name="none", resolution=32, output_dir=str(tmp_path / "run"))
    model = build_model(config, VQGANConfig(**fields))
    stock = set(FAST_BLOCKS) | {Upsample2D}
    kinds = {type(module) for module in model.modules()}
    assert not kinds & stock and kinds & set(FAST_BLOCKS.values())
    model.save_pretrained(tmp_path / "model")
    loaded = VQGANModel.from_pretrained(tmp_path / "model")
    assert not {type(module) for module in loaded.modules()} & set(FAST_BLOCKS.values())
    assert not (tmp_path / "model" / "fast_blocks.py").exists()
