"""One interface to the autoencoders that are compared: our own, published VQ tokenizers, diffusers' AutoencoderKL."""

import math
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import Tensor, nn

from ..configuration_vqgan import VQGANConfig
from ..files.checkpoint_files import read_config
from ..files.sources import check_source
from ..modeling_vqgan import VQGANModel


class Autoencoder(nn.Module):
    """
    A model whose latents are made, quantized where it has codes, and decoded.

    Args:
        model (`VQGANModel` or `AutoencoderKL`): In eval mode from here on.
        name (`str`): Where it came from.
    """

    def __init__(self, model: VQGANModel | AutoencoderKL, name: str):
        super().__init__()
        self.model, self.name = model.eval(), name

    @property
    def is_discrete(self) -> bool:
        """Whether images become codes (`VQGANModel`), not only continuous latents (`AutoencoderKL`)."""
        return isinstance(self.model, VQGANModel)

    @property
    def has_decoder(self) -> bool:
        return not (self.is_discrete and self.model.config.encoder_only)

    @property
    def downsample_factor(self) -> int:
        """f: pixels per latent position along each side."""
        return 2 ** (len(self.model.config.block_out_channels) - 1)

    @property
    def latent_channels(self) -> int:
        """D: numbers per latent position."""
        return self.model.config.vq_embed_dim if self.is_discrete else self.model.config.latent_channels

    @property
    def num_codes(self) -> int | None:
        """K, codes per codebook; `None` for continuous latents."""
        return self.model.quantize.num_codes if self.is_discrete else None

    @property
    def num_codebooks(self) -> int | None:
        """n, codes per latent position; `None` for continuous latents."""
        return self.model.quantize.num_codebooks if self.is_discrete else None

    @property
    def bits_per_pixel(self) -> float | None:
        """n·log2(K) / f², without entropy coding; `None` for continuous latents, whose bits nobody has counted."""
        if not self.is_discrete:
            return None
        return self.num_codebooks * math.log2(self.num_codes) / self.downsample_factor**2

    def encode(self, pixels: Tensor) -> Tensor:
        """Images `(B, 3, H, W)` in [-1, 1] to continuous latents `(B, D, H/f, W/f)`; of AutoencoderKL the means."""
        encoded = self.model.encode(pixels.to(self.model.dtype))
        return encoded.latents if self.is_discrete else encoded.latent_dist.mode()

    def quantize(self, latents: Tensor) -> tuple[Tensor, Tensor | None]:
        """Latents to what the decoder takes, `(B, D, h, w)`, and codes `(B, h, w[, n])`: `None` if it has none."""
        if not self.is_discrete:
            return latents, None
        chosen = self.model.quantize(latents)
        return chosen.quantized, chosen.indices

    def decode(self, quantized: Tensor) -> Tensor:
        """What `quantize` returned, or any other latents, to images `(B, 3, H, W)`, about [-1, 1]; nothing is rounded
        to codes here."""
        options = {"force_not_quantize": True} if self.is_discrete else {}
        return self.model.decode(quantized.to(self.model.dtype), **options).sample


def load_autoencoder(name: str | Path, dtype: torch.dtype | None = None) -> Autoencoder:
    """
    Load what `name` holds: a VQGANModel, a diffusers AutoencoderKL or VQModel, or any checkpoint that
    [`VQGANModel.from_original`] reads. Published VQ models become VQGANModels with the same codes and outputs.

    Args:
        name (`str` or `Path`): A folder or file, or `owner/name` on the Hub, with `/folder` (such as `/vae`) and
            `@revision` if need be.
        dtype (`torch.dtype`, *optional*): Of the weights. Default: as they are stored.

    Raises:
        FileNotFoundError, OSError: if there is no such thing.
        ValueError: if it is no autoencoder known here.
    """
    source, _, revision = str(name).partition("@")
    if Path(name).exists():
        source, revision = str(name), ""
    repo, folder = source, ""
    if not Path(source).exists():
        parts = source.split("/")
        if len(parts) < 2 or parts[0] in ("", ".", ".."):
            raise FileNotFoundError(f"{name}: no such file or folder, nor the owner/name of a Hub repository.")
        repo, folder = "/".join(parts[:2]), "/".join(parts[2:])
        check_source(name, repo=repo)
    config = _read_model_config(repo, folder, revision)
    places = {"subfolder": folder} if folder else {}
    options = places | ({"revision": revision} if revision else {})
    if config.get("model_type") == VQGANConfig.model_type:
        model = VQGANModel.from_pretrained(repo, **options)
    elif config.get("_class_name") == "AutoencoderKL":
        model = AutoencoderKL.from_pretrained(repo, **options)
    elif revision:
        raise ValueError(f"{name}: a revision is for VQGANModel and AutoencoderKL; convert this checkpoint first.")
    else:
        model = VQGANModel.from_original(source)
    return Autoencoder(model if dtype is None else model.to(dtype), str(name))


def _read_model_config(repo: str, folder: str, revision: str) -> dict:
    """config.json of a folder on disk or on the Hub, `{}` if it has none."""
    if Path(repo).exists():
        file = Path(repo) / "config.json"
        return read_config(file) if file.is_file() else {}
    try:
        return read_config(hf_hub_download(repo, "config.json", subfolder=folder or None, revision=revision or None))
    except EntryNotFoundError:
        return {}
