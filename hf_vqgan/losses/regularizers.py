"""What makes a latent space better to work in: latents that move with the image, bear noise, and know what they show.

A good reconstruction asks nothing of the latents but to be decodable. These options of the trainer ask for more; what
each of them gains and costs is measured in docs/latent_space.md.
"""

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbones import VisionBackbone

TRANSFORMS = ("scale", "rotate", "flip")


@dataclass(frozen=True)
class SpatialTransform:
    """
    A change that images and latents can share: a turn, a mirroring, and a resize to `side` of `sides` latent positions.

    Training the decoder to give τ(x) for τ(E(x)) makes latents equivariant: the map of a smaller or turned image is the
    image's map, made smaller or turned (EQ-VAE, https://huggingface.co/papers/2502.09509, eq. 3). With scale alone, it
    keeps high frequencies from meaning something else (https://huggingface.co/papers/2502.14831, section 4).
    """

    quarter_turns: int
    flip: bool
    side: int
    sides: int

    def __call__(self, grid: Tensor) -> Tensor:
        """`(B, C, H, W)`, square with H a multiple of `sides`, to `(B, C, H*side/sides, W*side/sides)`."""
        grid = torch.rot90(grid, self.quarter_turns, dims=(2, 3))
        grid = grid.flip(3) if self.flip else grid
        if self.side != self.sides:
            size = (grid.shape[2] // self.sides * self.side,) * 2
            grid = F.interpolate(grid, size, mode="bicubic", antialias=True)
        return grid


def draw_transform(
    kinds: list[str], share: float, sides: int, smallest: int, rng: random.Random
) -> SpatialTransform | None:
    """
    A random transform out of `kinds`, or with probability 1 - `share` none.

    `sides` latent positions become a quarter as many or more, but at least `smallest`; turns are quarters.
    """
    if rng.random() >= share:
        return None
    return SpatialTransform(
        quarter_turns=rng.randrange(1, 4) if "rotate" in kinds else 0,
        flip="flip" in kinds and rng.random() < 0.5,
        side=rng.randint(min(sides, max(smallest, -(-sides // 4))), sides) if "scale" in kinds else sides,
        sides=sides,
    )


def add_noise(latents: Tensor, std: float, generators: list[torch.Generator]) -> Tensor:
    """
    Latents `(B, D, h, w)` plus N(0, std²), drawn for each image from its own generator: a decoder that has seen noise
    leaves no sharp edges between the latents it knows (https://huggingface.co/papers/2507.15856, section 3).
    """
    draws = [torch.randn(latents.shape[1:], generator=generator) for generator in generators]
    return latents + std * torch.stack(draws).to(latents)


class FeatureAlignment(nn.Module):
    r"""
    Pulls latents towards the features of a frozen vision model (VA-VAE, https://huggingface.co/papers/2501.01423,
    section 3.2): with z the projected latents and f the features at the same places,

        mean relu(1 - m₁ - cos(z_i, f_i)) + mean relu(|cos(z_i, z_j) - cos(f_i, f_j)| - m₂),

    the first for what each place shows, the second for how places of one image relate.

    Args:
        name (`str`): Hub id or folder of a vision transformer that `transformers.AutoModel` loads.
        latent_dim (`int`): D.

    Raises:
        ValueError: if the model cannot be had, or is no vision transformer.
    """

    MARGIN, DISTANCE_MARGIN = 0.5, 0.25  # m₁ and m₂

    def __init__(self, name: str, latent_dim: int):
        super().__init__()
        self.backbone = VisionBackbone(name, "alignment_model", "set alignment_weight to 0")
        self.project = nn.Conv2d(latent_dim, self.backbone.dim, 1)

    @torch.no_grad()
    def features(self, pixel_values: Tensor, size: tuple[int, int]) -> Tensor:
        """Images `(B, 3, H, W)` in [-1, 1] to features `(B, F, *size)`."""
        (tokens,) = self.backbone(pixel_values)
        grid = tokens.unflatten(2, (self.backbone.grid, self.backbone.grid))
        return F.interpolate(grid, size, mode="bilinear", antialias=True)

    def forward(self, latents: Tensor, pixel_values: Tensor) -> Tensor:
        """Latents `(B, D, h, w)` and their images `(B, 3, H, W)` in [-1, 1] to the loss."""
        z = F.normalize(self.project(latents).flatten(2), dim=1)  # (B, F, h*w)
        f = F.normalize(self.features(pixel_values, latents.shape[2:]).flatten(2), dim=1)
        places = F.relu(1 - self.MARGIN - (z * f).sum(dim=1)).mean()
        relations = F.relu((z.transpose(1, 2) @ z - f.transpose(1, 2) @ f).abs() - self.DISTANCE_MARGIN).mean()
        return places + relations
