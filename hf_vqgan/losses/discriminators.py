"""
Discriminators: images in, logits out (high = looks real); and the augmentation of their inputs.

An image's logits depend on that image alone: no batch normalization, no minibatch statistics. One batch of 2B, two of
B, and two processes with B each then give the same gradients, and the logits of the reconstructions serve both the
generator's and the discriminator's loss.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from .backbones import VisionBackbone

DISCRIMINATORS = ("patchgan", "stylegan", "dino")


class PatchDiscriminator(nn.Sequential):
    r"""
    PatchGAN (https://huggingface.co/papers/1611.07004): a small convolutional network with one logit per patch, 16 to
    70 pixels wide for 1 to 3 layers, so that it judges texture and leaves content to the other losses.

    Has GroupNorm where pix2pix has BatchNorm.

    Args:
        in_channels (`int`): Channels of the images.
        channels (`int`): Channels after the first layer; doubled by each further one, up to eight-fold.
        num_layers (`int`): Stride-2 layers. The patch width is 16 / 34 / 70 pixels for 1 / 2 / 3.
    """

    def __init__(self, in_channels: int = 3, channels: int = 64, num_layers: int = 3):
        if channels % 8:
            raise ValueError(f"disc_channels={channels} must be a multiple of 8, the discriminator's group count.")
        layers: list[nn.Module] = [nn.Conv2d(in_channels, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for layer in range(1, num_layers + 1):
            previous, width = width, channels * min(2**layer, 8)
            stride = 2 if layer < num_layers else 1
            layers += [
                nn.Conv2d(previous, width, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(8, width),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(width, 1, 4, stride=1, padding=1))
        super().__init__(*layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)  # pix2pix, section 6.2
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`(B, C, H, W)` in [-1, 1] to logits `(B, 1, h, w)`."""
        return super().forward(pixel_values)


class _EqualizedConv2d(nn.Conv2d):
    """Weights from N(0, 1), scaled by 1/√fan_in at run time, so that Adam updates all layers at one relative rate."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        scale = 1 / math.sqrt(self.weight[0].numel())
        return F.conv2d(hidden, self.weight * scale, self.bias, self.stride, self.padding)


def _blur_and_halve(hidden: Tensor) -> Tensor:
    """Every second pixel after a binomial blur [1, 3, 3, 1]², so that halving does not alias."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=hidden.dtype, device=hidden.device) / 8
    channels = hidden.shape[1]
    kernel = torch.outer(taps, taps).expand(channels, 1, 4, 4)
    return F.conv2d(hidden, kernel, stride=2, padding=1, groups=channels)


class _ResidualHalving(nn.Module):
    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.conv1 = _EqualizedConv2d(channels, channels, 3, padding=1)
        self.conv2 = _EqualizedConv2d(channels, out_channels, 3, padding=1)
        self.skip = _EqualizedConv2d(channels, out_channels, 1, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        shortcut = self.skip(_blur_and_halve(hidden))
        hidden = F.leaky_relu(self.conv1(hidden), 0.2) * math.sqrt(2)
        hidden = F.leaky_relu(self.conv2(_blur_and_halve(hidden)), 0.2) * math.sqrt(2)
        return (hidden + shortcut) / math.sqrt(2)


class StyleGANDiscriminator(nn.Module):
    r"""
    StyleGAN2's residual discriminator (https://huggingface.co/papers/1912.04958, section 4): one logit for the whole
    image. Without its minibatch standard deviation, which would make an image's logit depend on the others.

    Best with `non_saturating` loss and `r1_weight`, as published.

    Args:
        resolution (`int`): Side of the images; halved down to 4 to 7 pixels.
        in_channels (`int`): Channels of the images.
        channels (`int`): Channels at full resolution; doubled by each halving, up to 512.
    """

    def __init__(self, resolution: int, in_channels: int = 3, channels: int = 64):
        super().__init__()
        halvings = int(math.log2(resolution)) - 2
        if halvings < 1 or resolution % 2**halvings:
            raise ValueError(
                f"resolution={resolution} does not suit the StyleGAN discriminator, which halves it down to 4 to 7 "
                "pixels: use a power of 2 from 8 on, or 5, 6 or 7 times one."
            )
        widths = [min(512, channels * 2**level) for level in range(halvings + 1)]
        self.stem = _EqualizedConv2d(in_channels, widths[0], 1)
        self.blocks = nn.ModuleList(_ResidualHalving(*pair) for pair in zip(widths[:-1], widths[1:], strict=True))
        self.conv = _EqualizedConv2d(widths[-1], widths[-1], 3, padding=1)
        # Fully connected layers, as convolutions over the last map
        self.hidden = _EqualizedConv2d(widths[-1], widths[-1], resolution >> halvings)
        self.logit = _EqualizedConv2d(widths[-1], 1, 1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`(B, C, H, W)` in [-1, 1] to logits `(B, 1, 1, 1)`."""
        hidden = F.leaky_relu(self.stem(pixel_values), 0.2) * math.sqrt(2)
        for block in self.blocks:
            hidden = block(hidden)
        for layer in (self.conv, self.hidden):
            hidden = F.leaky_relu(layer(hidden), 0.2) * math.sqrt(2)
        return self.logit(hidden)


class _TokenHead(nn.Module):
    """A logit per token, from its features and those of its neighbours in reading order."""

    def __init__(self, dim: int, width: int = 9):
        super().__init__()
        self.inner = spectral_norm(nn.Conv1d(dim, dim, 1))
        self.mix = spectral_norm(nn.Conv1d(dim, dim, width, padding=width // 2, padding_mode="circular"))
        self.norms = nn.ModuleList(nn.GroupNorm(1, dim) for _ in range(2))
        self.logit = spectral_norm(nn.Conv1d(dim, 1, 1))

    def forward(self, tokens: Tensor) -> Tensor:
        """`(B, D, N)` to `(B, 1, N)`."""
        hidden = F.leaky_relu(self.norms[0](self.inner(tokens)), 0.2)
        hidden = (hidden + F.leaky_relu(self.norms[1](self.mix(hidden)), 0.2)) / math.sqrt(2)
        return self.logit(hidden)


class DINODiscriminator(nn.Module):
    r"""
    Small heads on the features of a frozen vision transformer, at four depths (StyleGAN-T,
    https://huggingface.co/papers/2301.09515, section 4.2): its features are pretrained, so it helps from the first step
    and with little data. Has GroupNorm where StyleGAN-T has a form of BatchNorm.

    Its spectral norms advance by one power iteration per pass, so gradient accumulation equals a large batch only
    up to that.

    Args:
        backbone (`str`): Hub id or folder of a ViT that `transformers.AutoModel` loads, such as `facebook/dino-vits16`.

    Raises:
        ValueError: if it cannot be loaded, or is no vision transformer.
    """

    def __init__(self, backbone: str = "facebook/dino-vits16"):
        super().__init__()
        self.backbone = VisionBackbone(backbone, "disc_backbone", "use --disc_type patchgan")
        layers = self.backbone.num_layers
        self.depths = sorted({math.ceil(layers * quarter / 4) for quarter in (1, 2, 3, 4)})
        self.heads = nn.ModuleList(_TokenHead(self.backbone.dim) for _ in self.depths)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`(B, 3, H, W)` in [-1, 1] to logits `(B, depths, N)`, N tokens."""
        features = self.backbone(pixel_values, self.depths)
        return torch.cat([head(tokens) for head, tokens in zip(self.heads, features, strict=True)], dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation of what the discriminator sees

AUGMENTATIONS = ("color", "translation", "cutout")


def draw_augmentations(count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Uniform random numbers in [0, 1) for `count` images, on CPU: colour `(N, 3)` and two positions `(N, 2)`."""
    sizes = {"color": 3, "translation": 2, "cutout": 2}
    return {name: torch.rand(count, size, generator=generator) for name, size in sizes.items()}


def diff_augment(pixel_values: Tensor, policy: tuple[str, ...] | list[str], draws: Mapping[str, Tensor]) -> Tensor:
    """
    Differentiable augmentation (https://huggingface.co/papers/2006.10738): the discriminator sees real images and
    reconstructions brightened, shifted and with a square cut out, so that it cannot memorize a small dataset.

    Args:
        pixel_values (`Tensor`): `(B, C, H, W)` in [-1, 1].
        policy: Some of `AUGMENTATIONS`, applied in that order.
        draws: `draw_augmentations(B, ...)`: brightness -0.5 to 0.5, saturation 0 to 2, contrast 0.5 to 1.5; shifts of
            up to an eighth of the side, filled with zeros; a hole of half the side, its centre anywhere.
    """
    height, width = pixel_values.shape[2:]
    draws = {name: rows.to(pixel_values) for name, rows in draws.items()}
    if "color" in policy:
        brightness, saturation, contrast = (draws["color"][:, i, None, None, None] for i in range(3))
        pixel_values = pixel_values + brightness - 0.5
        grey = pixel_values.mean(dim=1, keepdim=True)
        pixel_values = grey + (pixel_values - grey) * (2 * saturation)
        mean = pixel_values.mean(dim=(1, 2, 3), keepdim=True)
        pixel_values = mean + (pixel_values - mean) * (0.5 + contrast)
    rows = torch.arange(height, device=pixel_values.device)
    columns = torch.arange(width, device=pixel_values.device)
    if "translation" in policy:
        down, right = (
            _uniform_integers(draws["translation"][:, i], side // 8) for i, side in enumerate((height, width))
        )
        rows_from, columns_from = rows - down[:, None], columns - right[:, None]  # (B, H), (B, W)
        image = torch.arange(len(pixel_values), device=pixel_values.device)[:, None, None]
        shifted = pixel_values.permute(0, 2, 3, 1)[
            image, rows_from.clamp(0, height - 1)[:, :, None], columns_from.clamp(0, width - 1)[:, None, :]
        ].permute(0, 3, 1, 2)
        inside = (rows_from == rows_from.clamp(0, height - 1))[:, None, :, None]
        inside = inside & (columns_from == columns_from.clamp(0, width - 1))[:, None, None, :]
        pixel_values = shifted * inside
    if "cutout" in policy:
        top, left = ((draws["cutout"][:, i, None] * side).floor() - side // 4 for i, side in enumerate((height, width)))
        hole = ((rows >= top) & (rows < top + height // 2))[:, :, None]
        hole = hole & ((columns >= left) & (columns < left + width // 2))[:, None, :]
        pixel_values = pixel_values * ~hole[:, None]
    return pixel_values


def _uniform_integers(uniform: Tensor, bound: int) -> Tensor:
    """Uniform [0, 1) to uniform integers from -bound to bound."""
    return (uniform * (2 * bound + 1)).floor().long() - bound
