"""A frozen vision transformer, as a feature extractor for a discriminator or as a target for latents."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel

from ..files.sources import check_source


class VisionBackbone(nn.Module):
    """
    Features of a pretrained vision transformer. Frozen; always in eval mode; gradients pass through to the images.

    Args:
        name (`str`): Hub id or folder of a vision transformer that `transformers.AutoModel` loads.
        flag (`str`): The flag by which the user chose it, for error messages.
        instead (`str`): What to do if it cannot be loaded, likewise.

    Raises:
        ValueError: if the model cannot be loaded, or is no vision transformer.
    """

    def __init__(self, name: str, flag: str, instead: str):
        super().__init__()
        try:
            check_source(name)
            self.model = AutoModel.from_pretrained(name).eval()
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{flag}={name!r} cannot be loaded ({error}). Give a folder with a copy of the model, or {instead}."
            ) from error
        config = self.model.config
        if not (hasattr(config, "patch_size") and hasattr(config, "image_size")):
            raise ValueError(f"{flag}={name!r} is a {config.model_type}; expected a vision transformer.")
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        self.num_layers, self.dim = config.num_hidden_layers, config.hidden_size
        self.side, self.grid = config.image_size, config.image_size // config.patch_size
        # What ImageNet networks expect, moved from [0, 1] to [-1, 1]
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None] * 2 - 1)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None] * 2)

    def train(self, mode: bool = True) -> "VisionBackbone":
        return super().train(False)

    def forward(self, pixel_values: Tensor, depths: list[int] | None = None) -> list[Tensor]:
        """
        Images `(B, 3, H, W)` in [-1, 1], resized to what the model was trained on, to the patches' features `(B, F, N)`
        after each of `depths` layers; without `depths`, to its last, normalised ones.
        """
        size = (self.side, self.side)
        if pixel_values.shape[2:] != size:
            pixel_values = F.interpolate(pixel_values, size, mode="bilinear", antialias=True)
        output = self.model((pixel_values - self.mean) / self.std, output_hidden_states=depths is not None)
        states = [output.last_hidden_state] if depths is None else [output.hidden_states[depth] for depth in depths]
        # Class and register tokens come before the patches.
        return [tokens[:, -(self.grid**2) :].transpose(1, 2) for tokens in states]
