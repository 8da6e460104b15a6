"""
Residual blocks that train faster in less memory, with the values, parameters and state-dict keys of the stock ones.

Of the six tensors that norm -> activation -> conv, twice, keeps for the backward pass, two are enough: the inputs of
the convolutions are recomputed from those of the norms, for a few percent of the time. And on CPU in channels_last,
PyTorch's backward pass of group normalization is several times slower than its formula. The gain: docs/performance.md.

The trainer installs them (`install_fast_blocks`); a loaded model has the stock blocks.
"""

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from ..blocks import is_plain, replace_blocks
from ..modeling_maskgit import MaskGitResnetBlock

# Operators that torch.nn.functional does not expose
_group_norm_backward = torch.ops.aten.native_group_norm_backward
_convolution_backward = torch.ops.aten.convolution_backward


class FastResnetBlock(ResnetBlock2D):
    """A `ResnetBlock2D` without time embedding and resampling."""

    def forward(self, input_tensor: Tensor, temb: None = None) -> Tensor:
        """`(B, in, h, w)` to `(B, out, h, w)`: x + conv2(dropout(act(norm2(conv1(act(norm1(x)))))))."""
        if self.dropout.p or not is_plain(self.dropout, nn.Dropout):
            return super().forward(input_tensor, temb)
        hidden = norm_act_conv(input_tensor, self.norm1, self.nonlinearity, self.conv1)
        hidden = norm_act_conv(hidden, self.norm2, self.nonlinearity, self.conv2)
        # The order of this sum decides its memory layout, and with that its rounding
        return (input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)) + hidden


class FastMaskGitResnetBlock(MaskGitResnetBlock):
    def norm_act_conv(self, x: Tensor, norm: nn.Module, conv: nn.Module) -> Tensor:
        return norm_act_conv(x, norm, self.act, conv)


FAST_BLOCKS: dict[type[nn.Module], type[nn.Module]] = {
    ResnetBlock2D: FastResnetBlock,
    MaskGitResnetBlock: FastMaskGitResnetBlock,
}


def install_fast_blocks(network: nn.Module) -> nn.Module:
    """Replace the residual blocks in `network` by those of this module, in place. Returns it."""
    return replace_blocks(network, FAST_BLOCKS)


def norm_act_conv(x: Tensor, norm: nn.Module, activation: nn.Module, conv: nn.Module) -> Tensor:
    """
    `conv(activation(norm(x)))`. In training mode, if it is GroupNorm, SiLU and a convolution and nothing else, only `x`
    is kept and the backward pass recomputes the rest.
    """
    as_usual = is_plain(norm, nn.GroupNorm) and is_plain(activation, nn.SiLU) and is_plain(conv, nn.Conv2d)
    if not (as_usual and norm.training and torch.is_grad_enabled()):
        return conv(activation(norm(x)))
    how = norm.num_groups, norm.eps, conv.stride, conv.padding, conv.dilation, conv.groups
    return _NormSiLUConv.apply(x, norm.weight, norm.bias, conv.weight, conv.bias, *how)


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
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError("in training mode, these blocks cannot be differentiated twice: use model.eval().")
        x, norm_weight, norm_bias, weight, bias, mean, rstd = ctx.saved_tensors
        groups, eps, stride, padding, dilation, conv_groups = ctx.how
        needed = ctx.needs_input_grad[:5]
        normalized, _, _ = _normalize(x, norm_weight, norm_bias, groups, eps)
        bias_size = None if bias is None else [len(bias)]
        at_hidden, at_weight, at_bias = _convolution_backward(
            gradient, F.silu(normalized).to(gradient.dtype), weight.to(gradient.dtype), bias_size, stride, padding,
            dilation, False, [0, 0], conv_groups, [any(needed[:3]), needed[3], needed[4]],
        )  # fmt: skip
        at_x = at_norm_weight = at_norm_bias = None
        if at_hidden is not None:
            at_hidden = at_hidden.to(normalized.dtype).contiguous(memory_format=_layout(x))
            at_normalized = torch.ops.aten.silu_backward(at_hidden, normalized)
            at_x, at_norm_weight, at_norm_bias = _norm_backward(at_normalized, x, norm_weight, mean, rstd)
        gradients = at_x, at_norm_weight, at_norm_bias, at_weight, at_bias
        like = x, norm_weight, norm_bias, weight, bias
        return (
            *(g.to(t.dtype) if need else None for g, t, need in zip(gradients, like, needed, strict=True)),
            *[None] * len(ctx.how),
        )


def _layout(x: Tensor) -> torch.memory_format:
    """Channels last only where it is another layout than the usual one."""
    last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _normalize(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised `x`; mean and 1/σ `(B, groups)`."""
    if x.device.type != "cpu":  # the CPU kernel takes half-precision inputs with float32 weights
        x = x.to(weight.dtype)
    return torch.native_group_norm(x, weight, bias, *x.shape[:2], x[0, 0].numel(), groups, eps)


def _norm_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    r"""
    Gradients at x, weight γ and bias β of y = γ x̂ + β with x̂ = (x - μ)/σ, μ and σ over the n values of a group, given
    g at y:

        ∂β = Σ g,   ∂γ = Σ g x̂,   ∂x = (γg - mean(γg) - x̂ mean(γ g x̂)) / σ
                                     = γg/σ + a x + b,   a = (μ Σ γg - Σ γgx) / (n σ³),   b = -a μ - Σ γg / (n σ)

    All sums are made of two per channel, Σ g and Σ g x; what is left is one pass over the elements.
    """
    batch, channels = x.shape[:2]
    groups = mean.shape[1]
    if x.device.type != "cpu" or _layout(x) != torch.channels_last:
        x = x.to(gradient.dtype)
        return _group_norm_backward(
            gradient, x, mean, rstd, weight, batch, channels, x[0, 0].numel(), groups, [True] * 3
        )
    count = x[0].numel() // groups
    wide = torch.promote_types(x.dtype, torch.float32)
    weight, mean, rstd = weight.to(wide), mean.to(wide), rstd.to(wide)
    rows, gradient_rows = (tensor.permute(0, 2, 3, 1).flatten(1, 2) for tensor in (x, gradient))  # (B, hw, C)
    sums = gradient_rows.sum(dim=1, dtype=wide)  # (B, C)
    products = (gradient_rows * rows).sum(dim=1, dtype=wide)
    weighted_sums, weighted_products = ((t * weight).view(batch, groups, -1).sum(dim=2) for t in (sums, products))
    a = (weighted_sums * mean - weighted_products) * rstd**3 / count  # (B, groups)
    b = -a * mean - weighted_sums * rstd / count
    a, b, rstd, mean = (value.repeat_interleave(channels // groups, dim=1) for value in (a, b, rstd, mean))  # (B, C)
    factor, offset, scale = (value.to(x.dtype)[:, None] for value in (a, b, rstd * weight))
    at_x = torch.addcmul(offset, rows, factor).addcmul_(gradient_rows, scale)
    at_weight = ((products - sums * mean) * rstd).sum(dim=0)
    return at_x.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2), at_weight, sums.sum(dim=0)
