"""Configurations of models of VQ-GAN tokens: what is needed to rebuild one, and nothing about how it was trained."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

# Fields that must be at least so large
LEAST = {
    "num_vq_embeddings": 1,
    "num_codebooks": 1,
    "sample_size": 1,
    "num_classes": 0,
    "hidden_size": 1,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_depth_layers": 1,
}


@strict
class TokenModelConfig(PreTrainedConfig):
    r"""
    What models of VQ-GAN tokens have in common: a vocabulary, a grid, classes, and a transformer of Llama's layers.

    Args:
        num_vq_embeddings (`int`, defaults to 8192): Number of codes K, as in [`VQGANConfig`].
        num_codebooks (`int`, defaults to 1): Codes n per position of the grid, as in [`VQGANConfig`].
        sample_size (`int`, defaults to 16): Side of the grid of tokens.
        num_classes (`int`, defaults to 0):
            How many classes can be asked for; 0 for an unconditional model. One more embedding, the last, is "no
            class".
        hidden_size (`int`, defaults to 384): Channels of the transformer.
        intermediate_size (`int`, *optional*):
            Channels inside of its feed-forward layers. `None`: 8/3 of `hidden_size`, rounded up to a multiple of 32.
        num_hidden_layers (`int`, defaults to 12): Its layers.
        num_attention_heads (`int`, defaults to 6): Attention heads per layer.
        dropout (`float`, defaults to 0.0): Dropout of input embeddings and attention weights in training.
        initializer_range (`float`, defaults to 0.02): Standard deviation of the initial weights.

    Raises:
        ValueError: for sizes out of bounds, and heads whose channels cannot be rotated in two dimensions.
    """

    num_vq_embeddings: int = 8192
    num_codebooks: int = 1
    sample_size: int = 16
    num_classes: int = 0
    hidden_size: int = 384
    intermediate_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    dropout: float | int = 0.0
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        for name, least in LEAST.items():
            if (value := getattr(self, name, least)) < least:
                raise ValueError(f"{name}={value} must be at least {least}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1).")
        if self.hidden_size % (4 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of 4 x num_attention_heads="
                f"{self.num_attention_heads}: half of a head's channels stand for rows, half for columns, in pairs."
            )
        if self.intermediate_size is None:
            self.intermediate_size = -(-self.hidden_size * 8 // 3 // 32) * 32
        super().__post_init__(**kwargs)

    @property
    def grid_shape(self) -> tuple[int, ...]:
        """Shape of an image's indices: `(h, w)`, or `(h, w, n)` with several codes per position."""
        side = (self.sample_size, self.sample_size)
        return side if self.num_codebooks == 1 else (*side, self.num_codebooks)


@strict
class AutoregressiveTokenConfig(TokenModelConfig):
    r"""
    Configuration of an [`AutoregressiveTokenModel`]; the other fields are those of [`TokenModelConfig`].

    Args:
        num_depth_layers (`int`, defaults to 2):
            Layers of the transformer over the codes of one position. Without effect where there is one code.
    """

    model_type = "vqgan_autoregressive_tokens"

    num_depth_layers: int = 2


@strict
class MaskedTokenConfig(TokenModelConfig):
    r"""Configuration of a [`MaskedTokenModel`]: the fields of [`TokenModelConfig`]."""

    model_type = "vqgan_masked_tokens"
