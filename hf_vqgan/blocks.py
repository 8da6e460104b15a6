"""
The blocks of encoder and decoder: diffusers', with less to remember and less to do.

Of the six tensors that norm -> activation -> conv, twice, would keep for the backward pass, two are enough: the
convolutions' inputs can be had again from the norms' for a few percent of the time. PyTorch's backward pass of group
normalisation in channels_last on CPU is several times slower than its formula. And a convolution of an enlarged image
needs fewer than half of its multiplications. The gain: docs/performance.md.
"""

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn.modules import module as of_all  # where hooks of all modules are kept

# Operators that modules have no access to
_group_norm_backward = torch.ops.aten.native_group_norm_backward
_convolution_backward = torch.ops.aten.convolution_backward

# Enlarging the weights instead of the image costs more than it saves on fewer pixels, of all images of a batch together
MIN_PIXELS = 1024


class ResidualBlock(ResnetBlock2D):
    """
    A `ResnetBlock2D` without time embedding and resampling: the same parameters, state-dict keys and values.
    """

    def forward(self, input_tensor: Tensor, temb: None = None) -> Tensor:
        """`(B, in, h, w)` to `(B, out, h, w)`: x + conv2(dropout(act(norm2(conv1(act(norm1(x)))))))."""
        # A VQ-GAN has no dropout: whoever sets it, or a hook on it, gets diffusers' own order of things.
        if self.dropout.p or not is_plain(self.dropout, nn.Dropout):
            return super().forward(input_tensor, temb)
        hidden = norm_act_conv(input_tensor, self.norm1, self.nonlinearity, self.conv1)
        hidden = norm_act_conv(hidden, self.norm2, self.nonlinearity, self.conv2)
        # In this order, which decides on the sum's layout and with that on rounding
        return (input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)) + hidden


class UpsamplingBlock(Upsample2D):
    """An `Upsample2D` by nearest neighbour with a 3x3 convolution, which [`upsample_conv`] takes together."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`(B, C, h, w)` to `(B, out, 2h, 2w)`."""
        return upsample_conv(hidden_states, self.conv)


# What diffusers' blocks become
LIGHT_BLOCKS = {ResnetBlock2D: ResidualBlock, Upsample2D: UpsamplingBlock}


def lighten(network: nn.Module) -> nn.Module:
    """Let diffusers' blocks in `network` be those of this module. Returns `network`, changed."""
    for block in network.modules():
        if type(block) in LIGHT_BLOCKS:
            block.__class__ = LIGHT_BLOCKS[type(block)]
    return network


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """
    Whether calling `module` does what `kind.forward` does with its parameters and nothing else, so that the result may
    be computed in another way. Otherwise somebody has a say in it who is to be heard: through hooks (of the module or
    of all modules; `prune`, old `weight_norm`), parametrizations or adapters (which change the type), a `forward` of
    its own (Accelerate, diffusers' offloading and casting), weights that are special tensors, padding other than zeros.
    """
    return (
        type(module) is kind
        and "forward" not in module.__dict__
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and not (of_all._global_forward_hooks or of_all._global_forward_pre_hooks)
        and not (of_all._global_backward_hooks or of_all._global_backward_pre_hooks)
        and all(weight is None or type(weight) is nn.Parameter for weight in module._parameters.values())
        and module.__dict__.get("padding_mode", "zeros") == "zeros"
    )


def upsample_conv(x: Tensor, conv: nn.Module) -> Tensor:
    """
    A 3x3 convolution of `x` enlarged twice by nearest neighbour: `(B, C, h, w)` to `(B, out, 2h, 2w)`.

    Nine neighbours in the enlarged image are copies of four pixels. Along one axis, with weights (a, b, c):

        y[2i] = a x[i-1] + (b + c) x[i],   y[2i+1] = (a + b) x[i] + c x[i+1]

    which is a transposed convolution of stride 2 with the weights (c, b + c, a + b, a): in two dimensions 16 products
    per pixel of x instead of 36, and no enlarged image (https://huggingface.co/papers/1609.07009).
    """
    few = x.device.type != "cpu" or len(x) * x.shape[2:].numel() < MIN_PIXELS  # measured on CPU alone
    if few or not is_plain(conv, nn.Conv2d):
        return conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    sums = F.avg_pool2d(conv.weight.flip(2, 3), 2, stride=1, padding=1, divisor_override=1)  # (out, C, 4, 4)
    return F.conv_transpose2d(x, sums.transpose(0, 1), conv.bias, stride=2, padding=1)


def norm_act_conv(x: Tensor, norm: nn.Module, activation: nn.Module, conv: nn.Module) -> Tensor:
    """
    `conv(activation(norm(x)))`. In training mode, where it is GroupNorm, SiLU and a convolution and nothing else, the
    backward pass has `x` alone to go by and computes the rest again. Without gradients, SiLU overwrites its input.
    """
    if not (is_plain(norm, nn.GroupNorm) and is_plain(activation, nn.SiLU) and is_plain(conv, nn.Conv2d)):
        return conv(activation(norm(x)))
    if norm.training and torch.is_grad_enabled():
        how = norm.num_groups, norm.eps, conv.stride, conv.padding, conv.dilation, conv.groups
        return _NormSiLUConv.apply(x, norm.weight, norm.bias, conv.weight, conv.bias, *how)
    return conv(F.silu(norm(x), inplace=not torch.is_grad_enabled()))


class _NormSiLUConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor | None, *how):
        groups, eps, *convolution = how
        x = x.contiguous(memory_format=_layout(x))
        normalized, mean, rstd = _normalize(x, norm_weight, norm_bias, groups, eps)
        ctx.save_for_backward(x, norm_weight, norm_bias, weight, bias, mean, rstd)
        ctx.how = how
        return F.conv2d(F.silu(normalized), weight, bias, *convolution)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight, norm_bias, weight, bias, mean, rstd = ctx.saved_tensors
        groups, eps, stride, padding, dilation, conv_groups = ctx.how
        wanted = ctx.needs_input_grad[:5]
        if torch.is_grad_enabled():  # somebody differentiates twice: slowly
            # By other names: x may itself come from these weights, and that is not for this block to differentiate.
            inputs = tuple(t if t is None else t.view_as(t) for t in (x, norm_weight, norm_bias, weight, bias))
            x, norm_weight, norm_bias, *convolution = inputs
            hidden = F.silu(F.group_norm(x.to(norm_weight.dtype), groups, norm_weight, norm_bias, eps))
            out = F.conv2d(hidden.to(gradient.dtype), *(t if t is None else t.to(gradient.dtype) for t in convolution),
                           stride, padding, dilation, conv_groups)  # fmt: skip
            needed = [tensor for tensor, want in zip(inputs, wanted, strict=True) if want]
            found = iter(torch.autograd.grad(out, needed, gradient, create_graph=True))
            return *(next(found) if want else None for want in wanted), *[None] * len(ctx.how)

        normalized, _, _ = _normalize(x, norm_weight, norm_bias, groups, eps)
        bias_size = None if bias is None else [len(bias)]
        at_hidden, at_weight, at_bias = _convolution_backward(
            gradient, F.silu(normalized).to(gradient.dtype), weight.to(gradient.dtype), bias_size, stride, padding,
            dilation, False, [0, 0], conv_groups, [any(wanted[:3]), wanted[3], wanted[4]],
        )  # fmt: skip
        at_x = at_norm_weight = at_norm_bias = None
        if at_hidden is not None:
            at_hidden = at_hidden.to(normalized.dtype).contiguous(memory_format=_layout(x))
            at_normalized = torch.ops.aten.silu_backward(at_hidden, normalized)
            at_x, at_norm_weight, at_norm_bias = _norm_backward(at_normalized, x, norm_weight, mean, rstd)
        found = at_x, at_norm_weight, at_norm_bias, at_weight, at_bias
        like = x, norm_weight, norm_bias, weight, bias
        return (
            *(g.to(t.dtype) if want else None for g, t, want in zip(found, like, wanted, strict=True)),
            *[None] * len(ctx.how),
        )


def _layout(x: Tensor) -> torch.memory_format:
    """Channels last only where it is another layout than the usual one."""
    last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _normalize(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised `x`; mean and 1/σ `(B, groups)`."""
    if x.device.type != "cpu":  # where the kernel takes half-precision inputs with float32 weights
        x = x.to(weight.dtype)
    return torch.native_group_norm(x, weight, bias, *x.shape[:2], x[0, 0].numel(), groups, eps)


def _norm_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    r"""
    Gradients at x, weight γ and bias β of y = γ x̂ + β with x̂ = (x - μ)/σ, μ and σ over the n numbers of a group, given
    g at y:

        ∂β = Σ g,   ∂γ = Σ g x̂,   ∂x = (γg - mean(γg) - x̂ mean(γ g x̂)) / σ
                                     = γg/σ + a x + b,   a = (μ Σ γg - Σ γgx) / (n σ³),   b = -a μ - Σ γg / (n σ)

    All sums are made of two per channel, Σ g and Σ g x; what is left is one pass over the numbers.
    """
    batch, channels = x.shape[:2]
    groups = mean.shape[1]
    if x.device.type != "cpu" or _layout(x) != torch.channels_last:
        x = x.to(gradient.dtype)
        return _group_norm_backward(
            gradient, x, mean, rstd, weight, batch, channels, x[0, 0].numel(), groups, [True] * 3
        )
    numbers = x[0].numel() // groups
    wide = torch.promote_types(x.dtype, torch.float32)
    weight, mean, rstd = weight.to(wide), mean.to(wide), rstd.to(wide)
    rows, gradient_rows = (tensor.permute(0, 2, 3, 1).flatten(1, 2) for tensor in (x, gradient))  # (B, hw, C)
    sums = gradient_rows.sum(dim=1, dtype=wide)  # (B, C)
    products = (gradient_rows * rows).sum(dim=1, dtype=wide)
    weighted_sums, weighted_products = ((t * weight).view(batch, groups, -1).sum(dim=2) for t in (sums, products))
    a = (weighted_sums * mean - weighted_products) * rstd**3 / numbers  # (B, groups)
    b = -a * mean - weighted_sums * rstd / numbers
    a, b, rstd, mean = (figure.repeat_interleave(channels // groups, dim=1) for figure in (a, b, rstd, mean))  # (B, C)
    factor, offset, scale = (figure.to(x.dtype)[:, None] for figure in (a, b, rstd * weight))
    at_x = torch.addcmul(offset, rows, factor).addcmul_(gradient_rows, scale)
    at_weight = ((products - sums * mean) * rstd).sum(dim=0)
    return at_x.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2), at_weight, sums.sum(dim=0)
