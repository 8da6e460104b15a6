"""Models of a VQ-GAN's tokens, autoregressive and masked, built from transformers' Llama layers.

Legend: B images, a grid of h x w = L positions, n codes per position, K codes in a codebook, C channels. An image's
indices are `(B, h, w)`, with several codes per position `(B, h, w, n)`; in here they are `(B, L, n)`. Positions are
numbered row by row.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
import torch.nn.functional as F
from diffusers.hooks import apply_group_offloading
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaModel, PreTrainedModel
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper
from transformers.utils import ModelOutput

from .configuration_token_model import AutoregressiveTokenConfig, MaskedTokenConfig, TokenModelConfig

ROTATION_BASE = 100.0  # wavelengths from 2π to 2π * base positions: grids have tens of them per side

Generators: TypeAlias = torch.Generator | list[torch.Generator] | None
Progress: TypeAlias = Callable[[Iterable], Iterable]


@dataclass
class TokenModelOutput(ModelOutput):
    """
    Args:
        logits (`Tensor` of shape `(B, h, w, K)`): Of each position's code; `(B, h, w, n, K)` with n codes per position.
    """

    logits: Tensor | None = None


@dataclass
class TokenSampling:
    """
    How tokens are drawn from their logits.

    Args:
        guidance_scale (`float`):
            w of classifier-free guidance (https://huggingface.co/papers/2207.12598), on logits: without + w * (with -
            without). 1 means no guidance, at half the work.
        temperature (`float`): Divides the logits; 0 takes the likeliest token.
        top_k (`int`): Keep the k likeliest tokens; 0 keeps all.
        top_p (`float`): Keep the likeliest tokens whose probabilities add up to p; 1 keeps all.
        generator (`torch.Generator` or one per image, *optional*): Source of randomness.

    Raises:
        ValueError: for values out of bounds.
    """

    guidance_scale: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    generator: Generators = None

    def __post_init__(self):
        if not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 0):
            raise ValueError(f"guidance_scale={self.guidance_scale} must be a finite number, at least 0.")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature={self.temperature} must be a finite number, at least 0.")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be at least 0, which means all tokens.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1]; 1 means all tokens.")

    def guide(self, logits: Tensor) -> Tensor:
        """Logits `(2B, ...)`, with the class and without, to those to choose by, `(B, ...)`."""
        with_class, without = logits.chunk(2)
        return without + self.guidance_scale * (with_class - without)

    def choose(self, logits: Tensor) -> Tensor:
        """Logits `(B, ..., K)`, float32, to tokens `(B, ...)`."""
        if self.temperature == 0:
            return logits.argmax(-1)
        kept = logits.flatten(0, -2) / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            kept = TopKLogitsWarper(self.top_k)(None, kept)
        if self.top_p < 1:
            kept = TopPLogitsWarper(self.top_p)(None, kept)
        # The first token up to which the probabilities add up to u: one that was filtered out adds nothing.
        sums = kept.softmax(-1).cumsum(-1).view(logits.shape)
        u = uniform(logits.shape[:-1], self.generator, logits.device) * sums[..., -1]
        return torch.searchsorted(sums, u[..., None])[..., 0]


def uniform(shape: tuple[int, ...], generator: Generators, device: torch.device) -> Tensor:
    """Numbers in (0, 1], float32, drawn where the generator is; with one generator per image, row by row."""
    if isinstance(generator, list):
        if len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators for {shape[0]} images: give one, or one per image.")
        return torch.cat([uniform((1, *shape[1:]), one, device) for one in generator])
    return 1 - torch.rand(shape, generator=generator, device=generator.device if generator else device).to(device)


class GridRotation(nn.Module):
    """
    Rotary position embeddings of a grid, in place of those of a `LlamaModel`: half of a head's channels turn with the
    row, half with the column. Position 0 is before the grid (the class), 1 + r * width + c is row r, column c.

    Nothing is kept in a buffer, which a cast to bfloat16 would round to other angles.
    """

    def __init__(self, head_dim: int, width: int):
        super().__init__()
        self.head_dim, self.width = head_dim, width

    def forward(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin `(B, T, head_dim)`, in the dtype of `hidden`, for positions `(B, T)`."""
        places = torch.stack([(position_ids - 1) // self.width + 1, (position_ids - 1) % self.width + 1], dim=-1)
        places = places * (position_ids > 0)[..., None]
        steps = torch.arange(0, self.head_dim // 2, 2, device=hidden.device, dtype=torch.float32)
        angles = places[..., None] * ROTATION_BASE ** (-steps / (self.head_dim // 2))  # (B, T, 2, head_dim / 4)
        angles = angles.flatten(-2).repeat(1, 1, 2)  # Llama turns channel i together with i + head_dim / 2
        return angles.cos().to(hidden.dtype), angles.sin().to(hidden.dtype)


def build_transformer(config: TokenModelConfig, num_layers: int, width: int) -> LlamaModel:
    """Llama's layers, without its embedding of tokens, for sequences of positions as `GridRotation` numbers them."""
    llama = LlamaConfig(
        vocab_size=1,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=config.num_attention_heads,
        attention_dropout=config.dropout,
        initializer_range=config.initializer_range,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation=config._attn_implementation,
    )
    transformer = LlamaModel(llama)
    transformer.embed_tokens = None  # distributed training would wait for the gradient of unused weights
    transformer.rotary_emb = GridRotation(llama.head_dim, width)
    return transformer


def run_transformer(
    transformer: LlamaModel,
    hidden: Tensor,
    positions: Tensor,
    cache: DynamicCache | None = None,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """`(B, T, C)` to `(B, T, C)`. Causal, unless the mask is a float one, added to the scores, `(1, 1, T, T)`."""
    if attention_mask is None and cache is None:
        # Positions that jump would be read as several sequences in one; a mask says that it is one.
        attention_mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    # By place: the fourth argument, the cache, has had two names.
    output = transformer(None, attention_mask, positions, cache, hidden, use_cache=cache is not None)
    return output.last_hidden_state


class TokenModel(PreTrainedModel):
    """What models of tokens share: embeddings of tokens and classes, a transformer over the grid, and heads."""

    config_class = TokenModelConfig
    base_model_prefix = "token_model"
    main_input_name = "indices"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["LlamaDecoderLayer"]

    def __init__(self, config: TokenModelConfig):
        super().__init__(config)
        self.token_embedding = nn.Embedding(config.num_codebooks * self.codes_per_book, config.hidden_size)
        self.class_embedding = nn.Embedding(config.num_classes + 1, config.hidden_size)  # the last: no class
        self.position_embedding = nn.Embedding(self.num_positions, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.transformer = build_transformer(config, config.num_hidden_layers, config.sample_size)
        self.heads = nn.ModuleList(
            nn.Linear(config.hidden_size, config.num_vq_embeddings, bias=False) for _ in range(config.num_codebooks)
        )

    @property
    def codes_per_book(self) -> int:
        """Rows of the embedding per codebook."""
        return self.config.num_vq_embeddings

    @property
    def no_class(self) -> int:
        """The class number that stands for no class."""
        return self.config.num_classes

    @property
    def num_positions(self) -> int:
        return self.config.sample_size**2

    def enable_group_offload(
        self, onload_device: torch.device | str, offload_to_disk_path: str | None = None, **options
    ) -> None:
        """
        Keep weights elsewhere, and bring groups of layers to `onload_device` as they run; arguments as for
        [`VQGANModel.enable_group_offload`]. Part by part, since sampling calls parts and not the whole.
        """
        parts = {name: part for name, part in self.named_children() if name != "heads"}
        for name, part in (parts | {f"head{number}": head for number, head in enumerate(self.heads)}).items():
            if next(part.parameters(), None) is not None:
                folder = offload_to_disk_path and str(Path(offload_to_disk_path) / name)
                apply_group_offloading(part, torch.device(onload_device), offload_to_disk_path=folder, **options)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.token_embedding

    def embed(self, tokens: Tensor) -> Tensor:
        """Codes `(..., n)` to vectors `(..., n, C)`."""
        return self.token_embedding(tokens + torch.arange(tokens.shape[-1], device=tokens.device) * self.codes_per_book)

    def embed_classes(self, class_labels: Tensor | None, indices: Tensor) -> Tensor:
        """The classes of `indices`, `(B, 1, C)`; `None` means no class."""
        if class_labels is None:
            class_labels = torch.full(indices.shape[:1], self.no_class, device=indices.device)
        return self.class_embedding(class_labels)[:, None]

    def flat(self, indices: Tensor) -> Tensor:
        """Indices as the VQ-GAN gives them to `(B, L, n)`, int64."""
        expected = self.config.grid_shape
        if indices.is_floating_point() or tuple(indices.shape[1:]) != expected:
            raise ValueError(
                f"indices of shape {tuple(indices.shape)} and type {indices.dtype}: expected integers of shape "
                f"{('B', *expected)}, codes of the VQ-GAN that this model was made for."
            )
        return indices.reshape(len(indices), self.num_positions, self.config.num_codebooks).long()

    def grid(self, flat: Tensor) -> Tensor:
        """`(B, L, n, ...)` to the shape of indices, `(B, h, w[, n], ...)`."""
        return flat.reshape(len(flat), *self.config.grid_shape, *flat.shape[3:])

    def raster(self, indices: Tensor) -> Tensor:
        """The order row by row, `(B, L)`, for tensors of B images, on their device."""
        return torch.arange(self.num_positions, device=indices.device).expand(len(indices), -1)

    def start_sampling(self, class_labels: Tensor | None, batch: int, sampling: TokenSampling) -> tuple[int, Tensor]:
        """How many images to make, and class numbers for the network: `(B,)`, or `(2B,)` where one guides the other."""
        if class_labels is None:
            return batch, torch.full((batch,), self.no_class, device=self.device)
        if sampling.guidance_scale == 1:
            return len(class_labels), class_labels
        return len(class_labels), torch.cat([class_labels, torch.full_like(class_labels, self.no_class)])


class AutoregressiveTokenModel(TokenModel):
    r"""
    p(image | class) as a product over positions, in any order, each given those before it: the chain rule, so that the
    likelihood is exact.

    Every input of the transformer is a token with its place and the place that comes next (RAR,
    https://huggingface.co/papers/2411.00776), so that one network serves all orders; row by row is the default.
    Where a position has several codes, a small transformer takes them one after another (RQ-Transformer,
    https://huggingface.co/papers/2203.01941), which is the chain rule again.

    Example:
    ```python
    model = AutoregressiveTokenModel(AutoregressiveTokenConfig(num_vq_embeddings=512, num_classes=10))
    bits = model.bits(vqgan.encode_indices(pixel_values), class_labels)  # (B,)
    indices = model.sample(class_labels, sampling=TokenSampling(guidance_scale=2.0))  # (B, 16, 16)
    ```
    """

    config_class = AutoregressiveTokenConfig

    def __init__(self, config: AutoregressiveTokenConfig):
        super().__init__(config)
        self.next_embedding = nn.Embedding(self.num_positions, config.hidden_size)
        self.depth_transformer = None
        if config.num_codebooks > 1:
            self.depth_transformer = build_transformer(config, config.num_depth_layers, config.num_codebooks)
        self.post_init()

    def forward(
        self,
        indices: Tensor,
        class_labels: Tensor | None = None,
        order: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> TokenModelOutput | tuple[Tensor]:
        """
        Logits of every token given the class and the tokens before it.

        Args:
            indices (`Tensor` of shape `(B, h, w)` or `(B, h, w, n)`): Integers in [0, K).
            class_labels (`Tensor` of shape `(B,)`, *optional*): `num_classes` means no class, and so does `None`.
            order (`Tensor` of shape `(B, L)`, *optional*):
                A permutation of [0, L) for each image: `order[b, t]` is the position that comes at time t. Default:
                row by row. The logits are in their places in the grid, whatever the order.
        """
        tokens = self.flat(indices)
        order = self.raster(tokens) if order is None else order
        embedded = self.embed(tokens).sum(-2)
        before = embedded.gather(1, order[:, :-1, None].expand(-1, -1, embedded.shape[-1]))
        before = before + self.position_embedding(order[:, :-1])
        before = torch.cat([self.embed_classes(class_labels, tokens), before], dim=1)
        hidden = self.dropout(before + self.next_embedding(order))
        hidden = run_transformer(self.transformer, hidden, F.pad(order[:, :-1] + 1, (1, 0)))
        # Back to the places in the grid: what is predicted at time t belongs to position order[t].
        hidden = torch.zeros_like(hidden).scatter(1, order[..., None].expand_as(hidden), hidden)
        logits = self.grid(self._depth_logits(hidden, tokens))
        wanted = self.config.return_dict if return_dict is None else return_dict
        return TokenModelOutput(logits=logits) if wanted else (logits,)

    @apply_forward_hook
    @torch.no_grad()
    def bits(self, indices: Tensor, class_labels: Tensor | None = None, order: Tensor | None = None) -> Tensor:
        """-log2 p(indices | class), exact, `(B,)`; arguments as for `forward`."""
        logits = self(indices, class_labels, order=order).logits.float()
        nats = F.cross_entropy(logits.flatten(0, -2), indices.flatten().long(), reduction="none")
        return nats.view(len(indices), -1).sum(1) / math.log(2)

    @apply_forward_hook
    @torch.no_grad()
    def sample(
        self,
        class_labels: Tensor | None = None,
        batch: int = 1,
        sampling: TokenSampling | None = None,
        order: Tensor | None = None,
        progress: Progress = iter,
    ) -> Tensor:
        """
        Draw images' indices `(B, h, w)` or `(B, h, w, n)`, with keys and values of earlier tokens kept.

        Args:
            class_labels (`Tensor` of shape `(B,)`, *optional*): Class numbers, where to compute. Default: no class.
            batch (`int`): B, if there are no `class_labels`.
            order (`Tensor` of shape `(B, L)`, *optional*): As for `forward`.
            progress (`Callable`): Wraps the iterable over positions, as tqdm does.
        """
        sampling = sampling or TokenSampling()
        count, labels = self.start_sampling(class_labels, batch, sampling)
        order = self.raster(labels[:count]) if order is None else order
        copies = len(labels) // count
        tokens = order.new_zeros(count, self.num_positions, self.config.num_codebooks)
        cache, hidden, position = DynamicCache(), self.embed_classes(labels, labels), torch.zeros_like(order[:, :1])
        for time in progress(range(self.num_positions)):
            place = order[:, time, None]
            hidden = hidden + self.next_embedding(place).repeat(copies, 1, 1)
            hidden = run_transformer(self.transformer, hidden, position.repeat(copies, 1), cache)
            chosen = self._choose_codes(hidden[:, 0], copies, sampling)
            tokens.scatter_(1, place[..., None].expand(-1, -1, chosen.shape[-1]), chosen[:, None])
            hidden = (self.embed(chosen).sum(-2)[:, None] + self.position_embedding(place)).repeat(copies, 1, 1)
            position = place + 1
        return self.grid(tokens)

    def _depth_logits(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Hidden states `(..., C)` and the position's first codes `(..., m)` to logits `(..., min(m + 1, n), K)`."""
        if self.depth_transformer is None:
            return self.heads[0](hidden)[..., None, :]
        before = self.embed(tokens[..., : self.config.num_codebooks - 1])  # the last code precedes none
        # Code d of a position: what the grid says, and the codes before it.
        inputs = torch.cat([hidden[..., None, :], hidden[..., None, :] + before.cumsum(-2)], dim=-2)
        rows = inputs.flatten(0, -3)
        positions = torch.arange(1, 1 + rows.shape[1], device=rows.device).expand(len(rows), -1)
        depths = run_transformer(self.depth_transformer, rows, positions).view(inputs.shape)
        return torch.stack([head(depths[..., d, :]) for d, head in enumerate(self.heads[: rows.shape[1]])], dim=-2)

    def _choose_codes(self, hidden: Tensor, copies: int, sampling: TokenSampling) -> Tensor:
        """Hidden states `(B, C)`, or `(2B, C)` with guidance, to the codes of one position, `(B, n)`."""
        chosen = hidden.new_zeros(len(hidden) // copies, 0, dtype=torch.long)
        for _ in range(self.config.num_codebooks):
            logits = self._depth_logits(hidden, chosen.repeat(copies, 1))[:, -1].float()
            code = sampling.choose(sampling.guide(logits) if copies == 2 else logits)
            chosen = torch.cat([chosen, code[:, None]], dim=1)
        return chosen


class MaskedTokenModel(TokenModel):
    r"""
    Fills in masked tokens, given those that are not masked and the class: MaskGIT,
    https://huggingface.co/papers/2202.04200.

    Where a position has several codes, each may be masked or not; its known codes are summed up.

    Example:
    ```python
    model = MaskedTokenModel(MaskedTokenConfig(num_vq_embeddings=512, num_classes=10))
    indices = model.sample(class_labels, num_inference_steps=12, sampling=TokenSampling(guidance_scale=2.0))
    ```
    """

    config_class = MaskedTokenConfig

    def __init__(self, config: MaskedTokenConfig):
        super().__init__(config)
        self.post_init()

    @property
    def codes_per_book(self) -> int:
        return self.config.num_vq_embeddings + 1  # the last: masked

    def forward(
        self,
        indices: Tensor,
        class_labels: Tensor | None = None,
        masked: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> TokenModelOutput | tuple[Tensor]:
        """
        Logits of every token given the class and the tokens that are not masked.

        Args:
            indices (`Tensor` of shape `(B, h, w)` or `(B, h, w, n)`): Integers in [0, K); any where masked.
            class_labels (`Tensor` of shape `(B,)`, *optional*): `num_classes` means no class, and so does `None`.
            masked (bool `Tensor` of the shape of `indices`, *optional*): The tokens not to look at. Default: none.
        """
        if masked is not None:
            indices = torch.where(masked, self.config.num_vq_embeddings, indices)
        hidden = self.embed(self.flat(indices)).sum(-2) + self.position_embedding(self.raster(indices[:1]))
        hidden = self.dropout(torch.cat([self.embed_classes(class_labels, indices), hidden], dim=1))
        length = hidden.shape[1]
        positions = torch.arange(length, device=hidden.device).expand(len(hidden), -1)
        everything = hidden.new_zeros(1, 1, length, length)
        hidden = run_transformer(self.transformer, hidden, positions, attention_mask=everything)[:, 1:]
        logits = self.grid(torch.stack([head(hidden) for head in self.heads], dim=-2))
        wanted = self.config.return_dict if return_dict is None else return_dict
        return TokenModelOutput(logits=logits) if wanted else (logits,)

    @apply_forward_hook
    @torch.no_grad()
    def bits_upper_bound(
        self,
        indices: Tensor,
        class_labels: Tensor | None = None,
        num_draws: int = 16,
        generator: Generators = None,
    ) -> Tensor:
        r"""
        An estimate of an upper bound of -log2 p(indices | class), `(B,)`, where p is the model's when it fills in one
        token at a time, in random order.

        The bound is -E log2 p(indices | order) over all orders (https://huggingface.co/papers/2110.02037), which is
        N / k * Σ -log2 p(token | tokens not masked) on average over k, uniform in 1..N, and the k masked tokens.
        The estimate is unbiased; its variance falls with `num_draws`, whose k are spread evenly over 1..N. With one
        `generator` per image, an image's estimate does not depend on the others of its batch.
        """
        count = math.prod(self.config.grid_shape)
        total = torch.zeros(len(indices), device=indices.device)
        for number in range(num_draws):
            # (B,) numbers of masked tokens: a random one of each of num_draws equal parts of 1..N
            u = uniform((len(indices),), generator, torch.device("cpu")).double()
            k = ((number + u) / num_draws * count).long().clamp(max=count - 1) + 1
            masked = random_subsets(len(indices), k, count, generator).view(indices.shape).to(indices.device)
            logits = self(indices, class_labels, masked=masked).logits.float()
            nats = F.cross_entropy(logits.flatten(0, -2), indices.flatten().long(), reduction="none")
            total += (nats.view(indices.shape) * masked).flatten(1).sum(1) * (count / k).to(total)
        return total / num_draws / math.log(2)

    @apply_forward_hook
    @torch.no_grad()
    def sample(
        self,
        class_labels: Tensor | None = None,
        batch: int = 1,
        sampling: TokenSampling | None = None,
        num_inference_steps: int = 12,
        choice_temperature: float = 4.5,
        progress: Progress = iter,
    ) -> Tensor:
        """
        Draw images' indices `(B, h, w)` or `(B, h, w, n)` in `num_inference_steps` passes.

        Each pass draws all masked tokens and keeps those with the highest confidence, so that the share cos(π/2 * t)
        stays masked at progress t. Confidence is log p of a token drawn, plus Gumbel noise that falls linearly to zero.

        Args:
            class_labels, batch, progress: As for [`AutoregressiveTokenModel.sample`].
            num_inference_steps (`int`): Passes; more than there are tokens are as many as there are tokens.
            choice_temperature (`float`): Scale of the noise at the start.
        """
        sampling = sampling or TokenSampling()
        if num_inference_steps < 1 or not choice_temperature >= 0:
            raise ValueError(
                f"num_inference_steps={num_inference_steps} must be at least 1, and choice_temperature="
                f"{choice_temperature} at least 0."
            )
        batch, labels = self.start_sampling(class_labels, batch, sampling)
        count = math.prod(self.config.grid_shape)
        steps = min(num_inference_steps, count)
        tokens = labels.new_zeros(batch, *self.config.grid_shape)
        masked = torch.ones_like(tokens, dtype=torch.bool)
        copies = (len(labels) // batch, *[1] * (tokens.ndim - 1))  # two where one guides the other
        for step in progress(range(1, steps + 1)):
            logits = self(tokens.repeat(copies), labels, masked=masked.repeat(copies)).logits.float()
            if copies[0] == 2:
                logits = sampling.guide(logits)
            chosen = sampling.choose(logits)
            gumbel = -(-uniform(tokens.shape, sampling.generator, tokens.device).clamp(max=1 - 2**-24).log()).log()
            confidence = logits.log_softmax(-1).gather(-1, chosen[..., None])[..., 0]
            confidence += choice_temperature * (1 - step / steps) * gumbel
            number = masked_count(step - 1, steps, count) - masked_count(step, steps, count)
            filled = torch.zeros_like(masked).flatten(1)
            filled.scatter_(1, confidence.masked_fill(~masked, -math.inf).flatten(1).topk(number).indices, True)
            filled = filled.view_as(masked)
            tokens, masked = torch.where(filled, chosen, tokens), masked & ~filled
        return tokens


def masked_count(step: int, steps: int, count: int) -> int:
    """
    How many of `count` tokens are masked after `step` of `steps` <= count passes: the cosine schedule, but each pass
    fills in at least one token and leaves one for every pass that follows.
    """
    cosine = math.floor(math.cos(math.pi / 2 * step / steps) * count)
    return min(max(cosine, steps - step), count - step)


def random_subsets(batch: int, sizes: Tensor, count: int, generator: Generators = None) -> Tensor:
    """Uniformly random subsets of `count` things, of sizes `(B,)`, as masks `(B, count)`, on the CPU."""
    ranks = uniform((batch, count), generator, torch.device("cpu")).argsort(1).argsort(1)
    return ranks < sizes[:, None]
