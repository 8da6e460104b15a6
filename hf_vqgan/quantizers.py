"""Vector quantizers: continuous latents in, codes and their indices out.

Shapes: B images, D numbers per code, h x w latent positions, N = B*h*w vectors, K codes per codebook, n codebooks.

Every quantizer guarantees the following, which the test suite checks for each entry of `QUANTIZERS`:
1. `forward` changes no weight and no buffer, in training or not. Updates that are not by gradient are methods that the
   trainer calls: `initialize_codebook`, `update_codebook`, `restart_codes`.
2. `quantized` equals `codes(indices)` bit for bit: the decoder sees in training what it later sees from stored indices.
   (The one exception is an option: `normalize_on_lookup`.)
3. Codes are chosen in float32 or better, whatever the model's dtype and the precision that PyTorch may use for
   products. In bfloat16, as many as all choices are wrong.
4. Losses are named and unweighted; `loss_names` lists them in advance.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init

from .configuration_vqgan import VQGANConfig
from .lookup import cluster_sums, common_offset, exact_products, kmeans, near_codes, nearest_code

T = TypeVar("T")


@dataclass
class QuantizerOutput:
    """
    Args:
        quantized (`Tensor` of shape `(B, D, h, w)`): The chosen codes, in the dtype of the latents.
        indices (`Tensor` of shape `(B, h, w)`, or `(B, h, w, n)` with n codebooks, int64): Indices of the chosen codes.
        losses (`dict[str, Tensor]`): Named, unweighted scalars, in float32 or better.

    Also unpacks as diffusers' `VectorQuantizer` result, `quantized, loss, (perplexity, encodings, flat_indices)`.
    """

    quantized: Tensor
    indices: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)

    def __iter__(self):
        loss = sum(self.losses.values(), start=torch.zeros((), device=self.quantized.device))
        return iter((self.quantized, loss, (None, None, self.indices.flatten())))

    def __getitem__(self, index: int):
        return tuple(self)[index]


def wide(tensor: Tensor) -> Tensor:
    """`tensor` in float32, or as it is if its dtype is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


_constants: dict[tuple, Tensor] = {}


def constant(values: tuple[int, ...] | tuple[float, ...], device: torch.device) -> Tensor:
    """
    `values` as an int64 or float32 tensor, not to be changed in place. They are copied to each device once, because
    every such copy waits for the device.
    """
    dtype = torch.int64 if isinstance(values[0], int) else torch.float32
    if torch.compiler.is_compiling():  # a compiled graph has its own
        return torch.tensor(values, dtype=dtype, device=device)
    key = (values, dtype, device)
    if key not in _constants:
        with torch.inference_mode(False):  # training may be next to need it
            made = torch.tensor(values, dtype=dtype, device=device)
        if type(made) is not Tensor:  # belongs to a trace
            return made
        _constants[key] = made
    return _constants[key]


def in_parts(function: Callable[[Tensor], T], rows: Tensor, num_codes: int, max_scores: int = 2**24) -> list[T]:
    """
    `function` of as many `rows` at a time as have `max_scores` scores for `num_codes` codes; the backward pass computes
    each part again instead of keeping its scores. `function` draws no random numbers.
    """
    parts = rows.split(max(1, max_scores // num_codes))
    return [checkpoint(function, part, use_reentrant=False, preserve_rng_state=False) for part in parts]


def entropy(probabilities: Tensor) -> Tensor:
    """-Σ p log p over the last dimension, in nats; 0 log 0 = 0, with a finite gradient there."""
    return -(probabilities * probabilities.clamp_min(1e-20).log()).sum(dim=-1)


def entropy_loss(vectors: Tensor, codebook: Tensor, temperature: float, max_scores: int = 2**24) -> Tensor:
    r"""
    E[H(p)] - H(E[p]) with p = softmax(-|z - e|² / τ): each vector should be sure of its code, and all codes be used
    (MAGVIT-v2, https://huggingface.co/papers/2310.05737, eq. 5).

    Holds at most `max_scores` of the N x K probabilities at a time.
    """
    offset = common_offset(codebook)
    vectors, codebook = vectors - offset, codebook - offset

    def part(rows: Tensor) -> tuple[Tensor, Tensor]:
        with exact_products():  # in the backward pass, too; a low temperature magnifies errors
            # |z|² is the same for all codes and drops out of the softmax
            logits = (rows @ codebook.T - 0.5 * codebook.square().sum(dim=1)) * (2 / temperature)
        p = logits.softmax(dim=1)
        return entropy(p).sum(), p.sum(dim=0)

    parts = in_parts(part, vectors, len(codebook), max_scores)
    sure, used = (sum(sums) / len(vectors) for sums in zip(*parts, strict=True))
    return sure - entropy(used)


def entropy_loss_of_bits(logits: Tensor, group: int = 8) -> Tensor:
    """
    The same for K = 2^D codes made of independent bits, from their logits `(N, D)`. E[H(p)] is exact; H(E[p]) is
    summed over groups of up to `group` bits, exact for D <= group and an upper bound above
    (BSQ, https://huggingface.co/papers/2406.07548, section 3.3).
    """
    p = logits.sigmoid().T
    bits = torch.stack([1 - p, p], dim=1)  # (D, 2, N)
    sure = entropy(bits.transpose(1, 2)).sum(dim=0).mean()
    used = 0
    for part in bits.split(group):
        # The mean over vectors of all products of one half's and the other's probabilities is a matrix product
        first, second = (_joint(half) for half in part.tensor_split(2))
        with exact_products():
            used = used + entropy((first @ second.T).flatten() / len(logits))
    return sure - used


def _joint(bits: Tensor) -> Tensor:
    """Probabilities `(m, 2, N)` of m independent bits to those of their combinations `(2^m, N)`."""
    joint = bits.new_ones(1, bits.shape[2])
    for bit in bits:
        joint = (bit[:, None] * joint).flatten(0, 1)
    return joint


class _PassGradient(torch.autograd.Function):
    """
    Forward: the code itself, to the last bit. Backward: the gradient passes to `carrier` as if it had been the output
    (straight-through), and to the code.

    Writing this as z + (q - z).detach() would round: in bfloat16 a third or more of the values come out unequal to q.
    """

    @staticmethod
    def forward(ctx, carrier: Tensor, code: Tensor) -> Tensor:
        return code.view_as(code)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, grad


class _Rotate(torch.autograd.Function):
    r"""
    Forward: the codes e `(N, D)`. Backward to the latents z: as if e = λRz with λ = |e|/|z| and R the rotation that
    takes z to e in their common plane, both held constant (rotation trick, https://huggingface.co/papers/2410.06424,
    eq. 4): the gradient's angle to the code is kept as its angle to the latent. With r = (ẑ+ê)/|ẑ+ê|,

        Rᵀg = g - 2 r (r·g) + 2 ẑ (ê·g).
    """

    @staticmethod
    def forward(ctx, latents: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(latents, codes)
        return codes.view_as(codes)

    @staticmethod
    def backward(ctx, grad: Tensor):
        z, e = (saved.detach() for saved in ctx.saved_tensors)  # λ and R are constants, in second derivatives, too
        z_norm, e_norm = (x.norm(dim=1, keepdim=True).clamp_min(1e-6) for x in (z, e))
        z_hat, e_hat = z / z_norm, e / e_norm
        r = F.normalize(z_hat + e_hat, dim=1)
        turned = (
            grad - 2 * r * (r * grad).sum(dim=1, keepdim=True) + 2 * z_hat * (e_hat * grad).sum(dim=1, keepdim=True)
        )
        return e_norm / z_norm * turned, None


@contextlib.contextmanager
def fetched(module: nn.Module) -> Iterator[None]:
    """
    Has the module's weights in place and in the compute dtype, even if Accelerate has offloaded them (`device_map`,
    sequential offloading) or diffusers stores them in another dtype (layerwise casting). Their hooks fetch a layer's
    weights for its forward pass only, and codebooks are read without one.
    """
    hooked = []
    for part in module.modules():
        if getattr(getattr(part, "_hf_hook", None), "offload", False):
            hooked.append((part, part._hf_hook))
        if (casting := layerwise_casting(part)) is not None:
            hooked.append((part, casting))
    for part, hook in hooked:
        hook.pre_forward(part)
    try:
        yield
    finally:
        for part, hook in hooked:
            hook.post_forward(part, None)


def layerwise_casting(module: nn.Module) -> Any | None:
    """The hook by which diffusers stores `module`'s own weights in one dtype and casts them to another to compute."""
    registry = getattr(module, "_diffusers_hook", None)
    return registry and registry.get_hook("layerwise_casting")


class Quantizer(nn.Module):
    """
    What every quantizer is to the model.

    Attributes:
        num_codes (`int`): K, codes per codebook.
        num_codebooks (`int`): Codes per latent position. With one, indices are `(B, h, w)`; with n, `(B, h, w, n)`.
        loss_names (`tuple[str]`): The losses that `forward` returns; the model's config holds `NAME_weight` for each.
    """

    loss_names: tuple[str, ...] = ()
    num_codebooks: int = 1
    _keep_in_fp32_modules_strict: list[str] = []  # VQGANModel adopts it from its instance's quantizer

    def __init__(self, config: VQGANConfig):
        super().__init__()
        self.num_codes = config.num_vq_embeddings
        self.embed_dim = config.vq_embed_dim

    def forward(self, latents: Tensor) -> QuantizerOutput:
        """Latents `(B, D, h, w)` to codes. The choice and the losses are computed in float32 or better."""
        if latents.ndim != 4 or latents.shape[1] != self.embed_dim:
            raise ValueError(f"latents of shape {tuple(latents.shape)}: expected (B, {self.embed_dim}, h, w).")
        if latents.numel() == 0:
            raise ValueError(f"latents of shape {tuple(latents.shape)} are empty: there is nothing to quantize.")
        # One sum is enough, as NaN and infinity propagate. In training they reach the losses, and the trainer skips the
        # step on all processes alike. The check waits for the device, which a CUDA graph cannot.
        precision = torch.promote_types(latents.dtype, torch.float32)
        captured = latents.is_cuda and torch.cuda.is_current_stream_capturing()
        checked = not (self.training or captured or torch.compiler.is_compiling())
        if checked and not latents.sum(dtype=precision).isfinite():
            bad = int((~torch.isfinite(latents)).sum())
            raise ValueError(
                f"{bad} of {latents.numel()} latent values are NaN or infinite. Check the input image, "
                "and whether the weights have diverged."
            )
        batch, dim, height, width = latents.shape
        with torch.autocast(latents.device.type, enabled=False), exact_products(), fetched(self):
            vectors = latents.permute(0, 2, 3, 1).reshape(-1, dim).to(precision)
            quantized, indices, losses = self.quantize_vectors(vectors)
        assert tuple(losses) == self.loss_names, f"{type(self).__name__} returned {tuple(losses)}"
        quantized = quantized.to(latents.dtype).view(batch, height, width, dim).permute(0, 3, 1, 2)
        return QuantizerOutput(quantized, indices.view(batch, height, width, *indices.shape[1:]), losses)

    def quantize_vectors(self, vectors: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """`(N, D)` to codes `(N, D)`, indices `(N,)` or `(N, n)`, and losses."""
        raise NotImplementedError

    def codes(self, indices: Tensor) -> Tensor:
        """Codes at indices `(B, h, w)`, or `(B, h, w, n)`, as `(B, D, h, w)`."""
        with exact_products(), fetched(self):
            vectors = self.code_vectors(indices.reshape(-1, *indices.shape[3:]))
        return vectors.view(*indices.shape[:3], self.embed_dim).permute(0, 3, 1, 2)

    def code_vectors(self, indices: Tensor) -> Tensor:
        """Codes at indices `(N,)`, or `(N, n)`, as `(N, D)`."""
        raise NotImplementedError

    def to_codebook(self) -> Tensor | None:
        """`(K, D)` if the choice is the Euclidean nearest row of a plain codebook, as in diffusers; else `None`."""
        return None

    # What the trainer calls besides `forward`. Quantizers without trainable codes inherit these defaults.

    def codebook_parameters(self) -> list[nn.Parameter]:
        """Per codebook, the `(K, D/n)` weight whose rows can be started from data and restarted; empty if fixed."""
        return []

    def initialize_codebook(self, vectors: Tensor, generator: torch.Generator | None = None) -> None:
        """Start the codes as the k-means of latents `(N, D)`."""

    def codebook_statistics(self, vectors: Tensor, indices: Tensor) -> Tensor | None:
        """The sums that `update_codebook` needs of latents `(N, D)` and indices `(N,)` or `(N, n)`, to be added up over
        processes; `None` if it needs nothing."""
        return None

    def update_codebook(self, statistics: Tensor) -> None:
        """Move the codes by the statistics of one step of all processes."""

    def restart_codes(self, dead: Tensor, vectors: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """
        Move codes marked in `dead` `(n*K,)` bool onto distinct, randomly drawn latents out of `vectors` `(N, D)`.

        Returns:
            `Tensor` `(n*K,)` bool: the codes that were moved, fewer than `dead` if there are fewer latents.
        """
        return torch.zeros_like(dead)


class Codebook(nn.Embedding):
    """K codes of dimension D, `weight` `(K, D)`: from U(±1/K) as in taming-transformers; frozen ones from N(0, 1/D)."""

    def __init__(self, num_embeddings: int, embedding_dim: int, frozen: bool = False):
        self.frozen = frozen  # read by reset_parameters, which the next line calls
        super().__init__(num_embeddings, embedding_dim)
        self.weight.requires_grad_(not frozen)

    def reset_parameters(self) -> None:
        if self.frozen:
            init.normal_(self.weight, std=self.embedding_dim**-0.5)
        else:
            init.uniform_(self.weight, -1 / self.num_embeddings, 1 / self.num_embeddings)


class VectorQuantizer(Quantizer):
    r"""
    A codebook learned by gradient (VQ-VAE, https://huggingface.co/papers/1711.00937): z becomes its nearest code e,

        e = argmin_e |z - e|²                                        (eqs. 1 and 2)
        commitment = |z - sg(e)|²,   codebook = |sg(z) - e|²         (eq. 3; means over elements, sg stops the gradient)

    and the decoder's gradient passes from e to z unchanged (straight-through).

    Options, for this class and those derived from it:
        `codebook_l2_norm`: z and e on the unit sphere, i.e. cosine similarity (ViT-VQGAN,
            https://huggingface.co/papers/2110.04627, section 3.1). With 8 dimensions, LlamaGen's recipe.
        `rotation_trick`: the gradient is rotated from e to z instead of copied (not for `ibq`, which does neither).
        `entropy_weight` > 0: the entropy loss, at a cost of N x K probabilities.
        `perturbation_share` > 0: in training, this share of the choices is replaced by a random one of the
            `perturbation_neighbours` nearest codes, so that the decoder tolerates wrong tokens
            (https://huggingface.co/papers/2503.08354).

    Choose it for models that others can load, and initialize it from data.
    """

    loss_names: tuple[str, ...] = ("commitment", "codebook")
    inner_product = False  # codes are ranked by distance

    def __init__(self, config: VQGANConfig):
        super().__init__(config)
        self.normalize = config.codebook_l2_norm
        self.normalize_on_lookup = config.normalize_on_lookup
        self.rotation_trick = config.rotation_trick
        self.entropy_temperature = config.entropy_temperature
        self.perturbation_share = config.perturbation_share
        self.perturbation_neighbours = min(config.perturbation_neighbours, self.num_codes)
        if config.entropy_weight:
            self.loss_names = (*self.loss_names, "entropy")
        self.embedding = Codebook(self.num_codes, self.embed_dim)
        if config.num_used_codes:
            self.register_buffer("used", torch.arange(config.num_used_codes))

    def codebook(self) -> Tensor:
        """The effective codes `(K, D)`, in float32 or better, with their gradient."""
        return self.project(wide(self.embedding.weight))

    def project(self, vectors: Tensor) -> Tensor:
        """Vectors as they are compared: unchanged, or on the unit sphere."""
        return F.normalize(vectors, dim=-1) if self.normalize else vectors

    def choose(self, z: Tensor, codebook: Tensor) -> Tensor:
        indices = nearest_code(z, codebook, inner_product=self.inner_product)
        if self.training and self.perturbation_share:
            # A number known in advance: to count what is drawn would be to wait for the device
            moved = torch.rand(len(z), device=z.device).topk(int(self.perturbation_share * len(z) + 0.5)).indices
            near = near_codes(z[moved], codebook, self.perturbation_neighbours, self.inner_product)
            picked = torch.randint(self.perturbation_neighbours, (len(moved), 1), device=z.device)
            indices = indices.index_copy(0, moved, near.gather(1, picked).flatten())
        return indices

    def quantize_vectors(self, vectors: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        z, codebook = self.project(vectors), self.codebook()
        indices = self.choose(z.detach(), codebook.detach())
        e = F.embedding(indices, codebook)
        losses = {"commitment": F.mse_loss(z, e.detach())}
        if "codebook" in self.loss_names:
            losses["codebook"] = F.mse_loss(e, z.detach())
        if "entropy" in self.loss_names:
            losses["entropy"] = entropy_loss(z, codebook, self.entropy_temperature)
        return (_Rotate if self.rotation_trick else _PassGradient).apply(z, e.detach()), indices, losses

    def code_vectors(self, indices: Tensor) -> Tensor:
        vectors = F.embedding(indices, self.codebook())
        return F.normalize(vectors, dim=-1) if self.normalize_on_lookup else vectors

    def remap_to_used(self, indices: Tensor, unknown: str | int = "random") -> Tensor:
        """
        Indices to their positions in `used`, the tokens of a transformer trained with taming-transformers' `remap`.

        Args:
            indices (`Tensor`): Of any shape, as `forward` returns them.
            unknown (`str` or `int`, defaults to `"random"`):
                For codes not in `used`: a random position each, as in the original; `"extra"` for `len(used)`; or a
                position.
        """
        used = self._used()
        order = used.argsort(stable=True)
        places = order[torch.searchsorted(used[order], indices).clamp(max=len(used) - 1)]
        if unknown == "random":
            others = torch.randint_like(places, len(used))
        else:
            others = torch.full_like(places, len(used) if unknown == "extra" else unknown)
        return torch.where(used[places] == indices, places, others)

    def unmap_to_all(self, places: Tensor) -> Tensor:
        """The inverse of `remap_to_used`; as in the original, the extra token `len(used)` becomes `used[0]`."""
        used = self._used()
        if places.min() < 0 or places.max() > len(used):
            raise ValueError(f"indices span [{places.min()}, {places.max()}] but {len(used)} codes are in use.")
        return used[torch.where(places == len(used), 0, places)]

    def _used(self) -> Tensor:
        if not hasattr(self, "used"):
            raise ValueError("num_used_codes=0: this model has no list of used codes to renumber indices by.")
        return self.used

    def to_codebook(self) -> Tensor:
        # Also on the sphere: among codes of equal length, the nearest to z is the nearest to z/|z|.
        return self.codebook().detach()

    def codebook_parameters(self) -> list[nn.Parameter]:
        return [self.embedding.weight]

    @torch.no_grad()
    def initialize_codebook(self, vectors: Tensor, generator: torch.Generator | None = None) -> None:
        self.embedding.weight.copy_(kmeans(self.project(vectors.float()), self.num_codes, generator=generator))

    @torch.no_grad()
    def restart_codes(self, dead: Tensor, vectors: Tensor, generator: torch.Generator | None = None) -> Tensor:
        if not len(vectors):
            return torch.zeros_like(dead)
        # The j-th dead code takes the j-th drawn latent, in shapes that do not depend on how many are dead: no waiting
        place = dead.cumsum(dim=0) - 1
        restarted = dead & (place < len(vectors))
        order = torch.randperm(len(vectors), generator=generator).to(vectors.device, non_blocking=True)
        drawn = self.project(vectors[order[place.clamp_(0, len(vectors) - 1)]].float())
        weight = self.embedding.weight
        weight.copy_(torch.where(restarted[:, None], drawn.to(weight.dtype), weight))
        return restarted


class EMAVectorQuantizer(VectorQuantizer):
    r"""
    A codebook that follows its data by moving averages (VQ-VAE, appendix A.1): with n_i latents z_ij nearest to code i,

        N_i <- γ N_i + (1-γ) n_i,   m_i <- γ m_i + (1-γ) Σ_j z_ij,   e_i = m_i / N_i.        (eqs. 7 and 8)

    Codes follow the encoder faster and more smoothly than by gradient, and need no codebook loss. Restarting a code
    resets its averages. Choose it when the codebook has to keep up: small batches, high learning rates, restarts.
    """

    loss_names = ("commitment",)
    _keep_in_fp32_modules_strict = ["cluster_size", "embed_avg"]  # for transformers; `_apply` is for all others

    def __init__(self, config: VQGANConfig):
        super().__init__(config)
        self.decay = config.ema_decay
        # Still a Parameter: moving averages of the whole model (diffusers' EMAModel) cover parameters only.
        self.embedding.weight.requires_grad_(False)
        self.register_buffer("cluster_size", wide(torch.empty(self.num_codes)))  # N
        self.register_buffer("embed_avg", wide(torch.empty(self.num_codes, self.embed_dim)))  # m
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Averages as if each code had been chosen by one latent, equal to itself, per step."""
        init.ones_(self.cluster_size)
        init.copy_(self.embed_avg, self.embedding.weight)

    def _apply(self, fn, recurse: bool = True):
        # Averages stay in float32 or wider: in bfloat16, a step with γ = 0.99 would change nothing.
        kept = {name: self._buffers[name] for name in ("cluster_size", "embed_avg")}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            if self._buffers[name].dtype.itemsize < 4:
                self._buffers[name] = buffer.to(self._buffers[name].device, torch.float32)
        return self

    def codebook_statistics(self, vectors: Tensor, indices: Tensor) -> Tensor:
        counts, sums = cluster_sums(self.project(vectors.to(self.embed_avg.dtype)), indices, self.num_codes)
        return torch.cat([counts[:, None], sums], dim=1)  # (K, 1 + D)

    @torch.no_grad()
    def update_codebook(self, statistics: Tensor) -> None:
        self.cluster_size.lerp_(statistics[:, 0], 1 - self.decay)
        self.embed_avg.lerp_(statistics[:, 1:], 1 - self.decay)
        alive = (self.cluster_size > 1e-6)[:, None]  # averages of a code long unused approach 0 / 0, so it stays
        means = (self.embed_avg / self.cluster_size[:, None]).to(self.embedding.weight.dtype)
        self.embedding.weight.copy_(torch.where(alive, means, self.embedding.weight))

    @torch.no_grad()
    def initialize_codebook(self, vectors: Tensor, generator: torch.Generator | None = None) -> None:
        super().initialize_codebook(vectors, generator)
        self.cluster_size.fill_(1)
        self.embed_avg.copy_(self.embedding.weight)

    @torch.no_grad()
    def restart_codes(self, dead: Tensor, vectors: Tensor, generator: torch.Generator | None = None) -> Tensor:
        restarted = super().restart_codes(dead, vectors, generator)
        self.cluster_size.masked_fill_(restarted, 1)
        self.embed_avg.copy_(torch.where(restarted[:, None], wide(self.embedding.weight), self.embed_avg))
        return restarted


class SimVectorQuantizer(VectorQuantizer):
    """
    SimVQ (https://huggingface.co/papers/2411.02038): codes e = c W, with c a row of a fixed random codebook and W a
    learned D x D matrix. Every code's gradient moves W and thereby all codes at once, so none is left behind. Choose it
    for very large codebooks.
    """

    def __init__(self, config: VQGANConfig):
        super().__init__(config)
        self.embedding = Codebook(self.num_codes, self.embed_dim, frozen=True)
        self.projection = nn.Linear(self.embed_dim, self.embed_dim, bias=False)

    def codebook(self) -> Tensor:
        return self.project(F.linear(wide(self.embedding.weight), wide(self.projection.weight)))

    def codebook_parameters(self) -> list[nn.Parameter]:
        return []

    def initialize_codebook(self, vectors: Tensor, generator: torch.Generator | None = None) -> None:
        """Does nothing: the codes are fixed, and W maps them to the data."""

    def restart_codes(self, dead: Tensor, vectors: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.zeros_like(dead)


class IndexBackpropagationQuantizer(VectorQuantizer):
    r"""
    IBQ (https://huggingface.co/papers/2412.02692): the code is the one with the largest dot product, and the gradient
    goes through the whole choice: with p = softmax(z Eᵀ) and the one-hot choice i,

        e = (i - sg(p) + p) E                                        (eq. 5)

    so every code gets a gradient at every step, not only the chosen ones. Choose it for large codebooks of high
    dimension; each step costs N x K probabilities (in parts, recomputed in the backward pass).
    """

    inner_product = True
    max_scores = 2**24

    def quantize_vectors(self, vectors: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        _, indices, losses = super().quantize_vectors(vectors)
        z, codebook = self.project(vectors), self.codebook()
        centred = codebook - common_offset(codebook)  # shifts all logits of a vector alike, which softmax ignores

        def soft_codes(rows: Tensor) -> Tensor:
            with exact_products():  # in the backward pass, too
                return (rows @ centred.T).softmax(dim=1) @ codebook.detach()

        soft = torch.cat(in_parts(soft_codes, z, len(codebook), self.max_scores))
        return _PassGradient.apply(soft, F.embedding(indices, codebook)), indices, losses

    def to_codebook(self) -> Tensor | None:
        return self.codebook().detach() if self.normalize else None  # else long codes are favoured


class GumbelQuantizer(Quantizer):
    r"""
    Codes drawn instead of looked up (DALL-E's and taming-transformers' GumbelVQ; gumbel-softmax:
    https://huggingface.co/papers/1611.01144): a linear layer gives logits, in training Gumbel noise g is added,

        i = argmax(logits + g),   gradient of Σ_k p_k e_k with p = softmax((logits + g) / τ),
        kl = Σ_k q_k log(K q_k),  q = softmax(logits): against using few codes.

    Choose it for compatibility with existing checkpoints. In eval mode, the most probable code is taken.
    """

    loss_names = ("kl",)

    def __init__(self, config: VQGANConfig):
        super().__init__(config)
        self.temperature = config.gumbel_temperature
        self.proj = nn.Linear(self.embed_dim, self.num_codes)
        self.embed = nn.Embedding(self.num_codes, self.embed_dim)

    def quantize_vectors(self, vectors: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        logits = F.linear(vectors, self.proj.weight.to(vectors.dtype), self.proj.bias.to(vectors.dtype))  # (N, K)
        log_q = logits.log_softmax(dim=1)
        losses = {"kl": (log_q.exp() * (log_q + math.log(self.num_codes))).sum(dim=1).mean()}
        if self.training:
            logits = logits - torch.empty_like(logits).exponential_().log()
        codes = self.embed.weight.to(vectors.dtype)
        indices = logits.argmax(dim=1)
        soft = (logits / self.temperature).softmax(dim=1) @ codes.detach()
        return _PassGradient.apply(soft, F.embedding(indices, codes)), indices, losses

    def code_vectors(self, indices: Tensor) -> Tensor:
        return F.embedding(indices, wide(self.embed.weight))


class FiniteScalarQuantizer(Quantizer):
    r"""
    FSQ (https://huggingface.co/papers/2309.15505): no codebook; each of few dimensions is squashed and rounded to L_d
    levels; the code's index is the mixed-radix number with these digits: K = Π L_d.

        q = round(tanh(z + s) (L-1)/2 - o),   code = q / ⌊L/2⌋,   o = ½ and s = atanh(2o/(L-1)) for even L, else 0

    s puts the code 0 at z = 0. With two levels that is impossible (s would be infinite, and one level out of reach), so
    s = 0 and their boundary is there.

    Nothing to collapse, nothing to tune. Choose it for up to about 2^16 codes, when the decoder (or what follows) can
    work with 3 to 6 values per position. `fsq_levels` sets K and D. Codes are not their own nearest codes (tanh), so
    decode stored codes by index, or with `force_not_quantize`.
    """

    def __init__(self, config: VQGANConfig):
        super().__init__(config)
        self.levels = list(config.fsq_levels)
        self.places = [math.prod(self.levels[:place]) for place in range(len(self.levels))]
        levels = torch.tensor(self.levels, dtype=torch.float32, device="cpu")
        half = (levels - 1) * (1 + 1e-3) / 2  # with a margin, so that tanh reaches the outermost levels
        offset = (levels % 2 == 0) * 0.5
        shift = torch.atanh(offset / half) * (levels > 2)
        # Not buffers: those that are not in a checkpoint are garbage after transformers' from_pretrained.
        self.squash = [tuple(values.tolist()) for values in (half, offset, shift)]

    def quantize_vectors(self, vectors: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        levels, places, middle = self._digits(vectors.device)
        half, offset, shift = (constant(values, vectors.device) for values in self.squash)
        bounded = torch.tanh(vectors + shift.to(vectors)) * half - offset
        digits = bounded.detach().round().long() + middle
        digits = digits.clamp(min=0).minimum(levels - 1)  # above 1,000 levels, the margin is wider than half a level
        indices = (digits * places).sum(dim=1)
        codes = self.code_vectors(indices).to(vectors.dtype)
        return _PassGradient.apply((bounded / middle).to(vectors.dtype), codes), indices, {}

    def code_vectors(self, indices: Tensor) -> Tensor:
        levels, places, middle = self._digits(indices.device)
        return (indices[:, None] // places % levels - middle) / middle

    def _digits(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        middle = tuple(level // 2 for level in self.levels)
        return constant(tuple(self.levels), device), constant(tuple(self.places), device), constant(middle, device)


class LookupFreeQuantizer(Quantizer):
    r"""
    LFQ (MAGVIT-v2, https://huggingface.co/papers/2310.05737): one bit per dimension, code = sign(z), K = 2^D. The
    entropy loss is what makes all bits carry information; give it a weight, and start high
    (`entropy_anneal_factor` of the trainer). Choose it for very large vocabularies; `vq_embed_dim` has to be log2(K).
    """

    loss_names: tuple[str, ...] = ("commitment", "entropy")

    def __init__(self, config: VQGANConfig):
        super().__init__(config)
        self.temperature = config.entropy_temperature
        self.scale = 1.0

    def project(self, vectors: Tensor) -> Tensor:
        return vectors

    def quantize_vectors(self, vectors: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        z = self.project(vectors)
        bits = z > 0
        indices = (bits * self._places(z.device)).sum(dim=1)
        codes = self.code_vectors(indices).to(z.dtype)
        # p(bit) ∝ exp(-|z - c|²/τ) for c = ±scale
        losses = {
            "commitment": F.mse_loss(z, codes),
            "entropy": entropy_loss_of_bits(z * (4 * self.scale / self.temperature)),
        }
        return _PassGradient.apply(z, codes), indices, {name: losses[name] for name in self.loss_names}

    def code_vectors(self, indices: Tensor) -> Tensor:
        bits = (indices[:, None] & self._places(indices.device)) > 0
        return (bits.float() * 2 - 1) * self.scale

    def _places(self, device) -> Tensor:
        return constant(tuple(2**place for place in range(self.embed_dim)), device)


class BinarySphericalQuantizer(LookupFreeQuantizer):
    """
    BSQ (https://huggingface.co/papers/2406.07548): LFQ on the unit sphere, code = sign(u)/√D with u = z/|z|. The error
    is bounded, so there is no commitment loss. Choose it over LFQ when its latents grow or its training is unstable.
    """

    loss_names = ("entropy",)

    def __init__(self, config: VQGANConfig):
        super().__init__(config)
        self.scale = self.embed_dim**-0.5

    def project(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=1)


class _CompositeQuantizer(Quantizer):
    """n quantizers of one kind (`base_quantizer`), and so n codes per position."""

    def __init__(self, config: VQGANConfig, embed_dim: int):
        super().__init__(config)
        self.num_codebooks = config.num_codebooks
        part = copy.deepcopy(config)
        part.vq_embed_dim = embed_dim
        self.parts = nn.ModuleList(SIMPLE_QUANTIZERS[config.base_quantizer](part) for _ in range(self.num_codebooks))
        self.loss_names = self.parts[0].loss_names
        self._keep_in_fp32_modules_strict = self.parts[0]._keep_in_fp32_modules_strict

    def shares(self, vectors: Tensor, indices: Tensor | None = None) -> list[Tensor]:
        """The input of each part for latents `(N, D)`, given the choices `(N, n)` if they are known."""
        raise NotImplementedError

    def codebook_parameters(self) -> list[nn.Parameter]:
        return [parameter for part in self.parts for parameter in part.codebook_parameters()]

    def codebook_statistics(self, vectors: Tensor, indices: Tensor) -> Tensor | None:
        shares = self.shares(vectors.float(), indices)
        parts = zip(self.parts, shares, indices.unbind(dim=1), strict=True)
        statistics = [part.codebook_statistics(share, index) for part, share, index in parts]
        return None if statistics[0] is None else torch.stack(statistics)

    def update_codebook(self, statistics: Tensor) -> None:
        for part, own in zip(self.parts, statistics, strict=True):
            part.update_codebook(own)

    def restart_codes(self, dead: Tensor, vectors: Tensor, generator: torch.Generator | None = None) -> Tensor:
        shares, restarted = self.shares(vectors.float()), []
        for part, share, own in zip(self.parts, shares, dead.view(self.num_codebooks, -1), strict=True):
            restarted.append(part.restart_codes(own, share, generator))
        return torch.cat(restarted)


class GroupedQuantizer(_CompositeQuantizer):
    """
    Product quantization: the D channels form n groups of D/n, each with its own codebook (UniTok,
    https://huggingface.co/papers/2502.20321, section 3.2; MGVQ). K^n combinations for n x K codes. Choose it for
    reconstruction quality, when the downstream model can predict n codes per position.
    """

    def __init__(self, config: VQGANConfig):
        super().__init__(config, config.vq_embed_dim // config.num_codebooks)

    def shares(self, vectors: Tensor, indices: Tensor | None = None) -> list[Tensor]:
        return list(vectors.chunk(self.num_codebooks, dim=1))

    def quantize_vectors(self, vectors: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        results = [part.quantize_vectors(share) for part, share in zip(self.parts, self.shares(vectors), strict=True)]
        quantized, indices, losses = zip(*results, strict=True)
        return torch.cat(quantized, dim=1), torch.stack(indices, dim=1), _mean_of(losses)

    def code_vectors(self, indices: Tensor) -> Tensor:
        codes = [part.code_vectors(index) for part, index in zip(self.parts, indices.unbind(dim=1), strict=True)]
        return torch.cat(codes, dim=1)

    def initialize_codebook(self, vectors: Tensor, generator: torch.Generator | None = None) -> None:
        for part, share in zip(self.parts, self.shares(vectors), strict=True):
            part.initialize_codebook(share, generator)


class ResidualQuantizer(_CompositeQuantizer):
    r"""
    RQ (https://huggingface.co/papers/2203.01941): each stage quantizes the residual of the stages before it,

        r_0 = z,   e_d = Q_d(r_{d-1}),   r_d = r_{d-1} - e_d,   quantized = Σ_d e_d        (eqs. 3 and 4)

    Coarse to fine: a prefix of the codes is a coarser image. Choose it for high fidelity at few positions.

    The gradient passes from the sum to z once, whatever the number of stages; with `rotation_trick`, through the
    rotation that takes z to the sum.
    """

    def __init__(self, config: VQGANConfig):
        super().__init__(config, config.vq_embed_dim)
        self.rotation_trick = config.rotation_trick

    def shares(self, vectors: Tensor, indices: Tensor | None = None) -> list[Tensor]:
        if indices is None:
            indices = self.quantize_vectors(vectors)[1]
        shares = [vectors]
        for part, index in zip(self.parts[:-1], indices.unbind(dim=1), strict=False):
            shares.append(shares[-1] - part.code_vectors(index).detach())
        return shares

    def quantize_vectors(self, vectors: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        residual, total, indices, losses = vectors, torch.zeros_like(vectors), [], []
        for part in self.parts:
            code, index, loss = part.quantize_vectors(residual)
            residual, total = residual - code.detach(), total + code.detach()
            indices.append(index)
            losses.append(loss)
        passed_on = _Rotate if self.rotation_trick else _PassGradient
        return passed_on.apply(vectors, total), torch.stack(indices, dim=1), _mean_of(losses)

    def code_vectors(self, indices: Tensor) -> Tensor:
        codes = (part.code_vectors(index) for part, index in zip(self.parts, indices.unbind(dim=1), strict=True))
        first = next(codes)
        return sum(codes, start=torch.zeros_like(first) + first)

    def initialize_codebook(self, vectors: Tensor, generator: torch.Generator | None = None) -> None:
        residual = vectors.float()
        for part in self.parts:
            part.initialize_codebook(residual, generator)
            residual = residual - part.code_vectors(part.quantize_vectors(residual)[1]).detach()


def _mean_of(losses) -> dict[str, Tensor]:
    return {name: torch.stack([part[name] for part in losses]).mean() for name in losses[0]}


SIMPLE_QUANTIZERS: dict[str, type[Quantizer]] = {
    "vq": VectorQuantizer,
    "vq_ema": EMAVectorQuantizer,
    "simvq": SimVectorQuantizer,
    "ibq": IndexBackpropagationQuantizer,
    "gumbel": GumbelQuantizer,
    "fsq": FiniteScalarQuantizer,
    "lfq": LookupFreeQuantizer,
    "bsq": BinarySphericalQuantizer,
}
QUANTIZERS: dict[str, type[Quantizer]] = SIMPLE_QUANTIZERS | {
    "residual": ResidualQuantizer,
    "grouped": GroupedQuantizer,
}
