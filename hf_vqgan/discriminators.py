"""Discriminators: images in, one logit per patch out (high = looks real)."""

from torch import Tensor, nn


class PatchDiscriminator(nn.Sequential):
    r"""
    PatchGAN (https://huggingface.co/papers/1611.07004): a small convolutional net whose every output judges one patch,
    16 to 70 pixels wide for 1 to 3 layers, so that it polices texture and leaves content to the other losses.

    Normalises by GroupNorm where pix2pix has BatchNorm: an image's logits then depend on that image alone. One batch
    of 2B, two of B, and two processes with B each give the same gradients; and the logits of the reconstructions can
    serve the generator's and the discriminator's loss alike.

    Args:
        in_channels (`int`): Channels of the images.
        channels (`int`): Channels after the first layer; doubled by each further one, up to eight-fold.
        num_layers (`int`): Stride-2 layers. The patch width is 16 / 34 / 70 pixels for 1 / 2 / 3.
    """

    def __init__(self, in_channels: int = 3, channels: int = 64, num_layers: int = 3):
        if channels % 8:
            raise ValueError(f"channels={channels} must be a multiple of 8, the discriminator's group count.")
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
