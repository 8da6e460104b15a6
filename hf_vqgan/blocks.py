"""The decoder's upsampling, with fewer than half of the multiplications on CPU. The gain: docs/performance.md."""

import torch.nn.functional as F
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn.modules import module as all_modules  # holds the hooks of all modules

MIN_PIXELS = 1024  # of all images of a batch; on fewer, summing the weights costs more than it saves


class UpsamplingBlock(Upsample2D):
    """An `Upsample2D` by nearest neighbour with a 3x3 convolution, which [`upsample_conv`] computes as one."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`(B, C, h, w)` to `(B, out, 2h, 2w)`."""
        return upsample_conv(hidden_states, self.conv)


def replace_blocks(network: nn.Module, replacements: dict[type[nn.Module], type[nn.Module]]) -> nn.Module:
    """Exchange the classes of the blocks in `network`, in place, for ones with the same parameters. Returns it."""
    for block in network.modules():
        if type(block) in replacements:
            block.__class__ = replacements[type(block)]
    return network


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """
    Whether calling `module` does what `kind.forward` does with its parameters and nothing else, so that the result may
    be computed in another way. Not so with hooks (of the module or of all modules; `prune`, old `weight_norm`),
    parametrizations and adapters (which change the type), a `forward` of its own (Accelerate, diffusers' offloading and
    casting), weights that are special tensors, or padding other than zeros.
    """
    return (
        type(module) is kind
        and "forward" not in module.__dict__
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and not (all_modules._global_forward_hooks or all_modules._global_forward_pre_hooks)
        and not (all_modules._global_backward_hooks or all_modules._global_backward_pre_hooks)
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
