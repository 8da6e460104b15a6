"""Encoder and decoder of MaskGIT's VQGAN (https://huggingface.co/papers/2202.04200): no attention, few biases.

They replace diffusers' `Encoder` and `Decoder` in `VQGANModel` and name their parts alike. The differences: average
pooling instead of strided convolutions, the same number of residual blocks per level of encoder and decoder, and the
shortcut of blocks that change the number of channels.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .blocks import upsample_conv

EPS = 1e-6


class MaskGitResnetBlock(nn.Module):
    """
    `(B, in, h, w)` to `(B, out, h, w)`: h = conv2(act(norm2(conv1(act(norm1(x)))))), then x + h where in = out.

    Where in != out the result is h + conv_shortcut(h): the shortcut convolves the block's own result, not its input.
    That is how the published weights were trained.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int, act: Callable[[Tensor], Tensor]):
        super().__init__()
        self.act = act
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        changes = in_channels != out_channels
        self.conv_shortcut = nn.Conv2d(out_channels, out_channels, 1, bias=False) if changes else None

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.norm_act_conv(features, self.norm1, self.conv1)
        hidden = self.norm_act_conv(hidden, self.norm2, self.conv2)
        return hidden + (features if self.conv_shortcut is None else self.conv_shortcut(hidden))

    def norm_act_conv(self, x: Tensor, norm: nn.Module, conv: nn.Module) -> Tensor:
        return conv(self.act(norm(x)))


class MaskGitUpsample(nn.Module):
    """Nearest neighbour x2, then a convolution: `(B, C, h, w)` to `(B, C, 2h, 2w)`."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        return upsample_conv(features, self.conv)


class MaskGitBlock(GradientCheckpointingLayer):
    """
    The residual blocks of one level, then (in the decoder, on every level but the last) the upsampling. With gradient
    checkpointing, the backward pass recomputes a level from its input.
    """

    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, act, upsample: bool = False):
        super().__init__()
        self.resnets = nn.ModuleList(
            MaskGitResnetBlock(out_channels if layer else in_channels, out_channels, groups, act)
            for layer in range(layers)
        )
        self.upsamplers = nn.ModuleList([MaskGitUpsample(out_channels)] if upsample else [])

    def forward(self, features: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            features = layer(features)
        return features


class MaskGitEncoder(nn.Module):
    """Images `(B, in, H, W)` to latents `(B, out, H/f, W/f)`; arguments as `diffusers` names them."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stem_channels: int,
        block_out_channels: tuple[int, ...],
        layers_per_block: int,
        norm_num_groups: int,
        act: Callable[[Tensor], Tensor],
    ):
        super().__init__()
        self.act = act
        self.conv_in = nn.Conv2d(in_channels, stem_channels, 3, padding=1, bias=False)
        inputs, last = (stem_channels, *block_out_channels[:-1]), block_out_channels[-1]
        self.down_blocks = nn.ModuleList(
            MaskGitBlock(before, after, layers_per_block, norm_num_groups, act)
            for before, after in zip(inputs, block_out_channels, strict=True)
        )
        self.mid_block = MaskGitBlock(last, last, layers_per_block, norm_num_groups, act)
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, last, eps=EPS)
        self.conv_out = nn.Conv2d(last, out_channels, 1)

    def forward(self, sample: Tensor) -> Tensor:
        features = self.conv_in(sample)
        for level, block in enumerate(self.down_blocks):
            features = block(features if level == 0 else F.avg_pool2d(features, 2))
        return self.conv_out(self.act(self.conv_norm_out(self.mid_block(features))))


class MaskGitDecoder(nn.Module):
    """Codes `(B, in, h, w)` to images `(B, out, h*f, w*f)`; arguments as `diffusers` names them."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        block_out_channels: tuple[int, ...],
        layers_per_block: int,
        norm_num_groups: int,
        act: Callable[[Tensor], Tensor],
    ):
        super().__init__()
        self.act = act
        channels = tuple(reversed(block_out_channels))
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.mid_block = MaskGitBlock(channels[0], channels[0], layers_per_block, norm_num_groups, act)
        self.up_blocks = nn.ModuleList(
            MaskGitBlock(before, after, layers_per_block, norm_num_groups, act, upsample=level < len(channels) - 1)
            for level, (before, after) in enumerate(zip((channels[0], *channels[:-1]), channels, strict=True))
        )
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, channels[-1], eps=EPS)
        self.conv_out = nn.Conv2d(channels[-1], out_channels, 3, padding=1)

    def forward(self, sample: Tensor, latent_embeds: None = None) -> Tensor:
        features = self.mid_block(self.conv_in(sample))
        for block in self.up_blocks:
            features = block(features)
        return self.conv_out(self.act(self.conv_norm_out(features)))
