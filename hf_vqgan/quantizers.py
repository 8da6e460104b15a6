"""Vector quantizers: continuous latents in, codes and their indices out.

Shapes: B images, D numbers per code, h x w latent positions, K codes, N = B*h*w vectors.

Every quantizer keeps four promises, which the test suite checks on each entry of `QUANTIZERS`:
1. `forward` is a function of its input: it changes no weight and no buffer, in training or not. What training has to
   change besides gradients is done by methods that the trainer calls by name (`initialize_codebook`, `restart_codes`).
2. `quantized` equals `codes(indices)` to the last bit: what the decoder sees in training is what it sees later from
   stored indices.
3. Codes are chosen in float32, whatever the dtype of the model. In bfloat16 a quarter of all choices can be wrong.
4. Losses are named and unweighted; `loss_names` says in advance which there are.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_vqgan import VQGANConfig


@dataclass
class QuantizerOutput:
    """
    Args:
        quantized (`Tensor` of shape `(B, D, h, w)`): The chosen codes, in the dtype of the latents.
        indices (`Tensor` of shape `(B, h, w)`, int64): Which code was chosen at each position.
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


def nearest_code(vectors: Tensor, codebook: Tensor, tile: int = 1024) -> Tensor:
    """
    Index of the nearest code in Euclidean distance, ties to the lowest index.

    Minimises ½|e|² - z·e, which orders codes as |z - e|² does. Leaving |z|² out is not (only) cheaper: added in
    float32 it swamps the differences between small codes and picks wrong ones. At most `tile`² scores exist at a time.

    Args:
        vectors (`Tensor` of shape `(N, D)`): z, any float dtype; compared in float32 (float64 stays).
        codebook (`Tensor` of shape `(K, D)`): e.

    Returns:
        `Tensor` of shape `(N,)`, int64.
    """
    dtype = torch.promote_types(vectors.dtype, torch.float32)
    with torch.no_grad(), torch.autocast(vectors.device.type, enabled=False):
        vectors, codebook = vectors.to(dtype), codebook.to(dtype)
        half_norms = codebook.square().sum(dim=1).mul_(0.5)
        indices = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
        for rows, chosen in zip(vectors.split(tile), indices.split(tile), strict=True):
            best = torch.full((len(rows),), torch.inf, dtype=dtype, device=rows.device)
            for start in range(0, len(codebook), tile):
                codes = codebook[start : start + tile]
                scores = torch.addmm(half_norms[start : start + tile], rows, codes.T, alpha=-1)  # (n, k)
                score, index = scores.min(dim=1)
                closer = score < best  # strictly: an equal code of an earlier tile stays chosen
                torch.where(closer, score, best, out=best)
                torch.where(closer, index + start, chosen, out=chosen)
    return indices


def kmeans(points: Tensor, num_clusters: int, iterations: int = 10, generator: torch.Generator | None = None) -> Tensor:
    """
    Lloyd's algorithm from a random subset of the points; a cluster that loses all its points restarts at a random one.

    Args:
        points (`Tensor` of shape `(N, D)`): With N < K, points are repeated with a little noise.
        num_clusters (`int`): K.

    Returns:
        `Tensor` of shape `(K, D)`, float32: the cluster means.
    """
    points = points.float()

    def sample(count: int) -> Tensor:
        order = torch.randperm(len(points), generator=generator)[:count].to(points.device)
        chosen = points[order]
        if count > len(points):
            rest = torch.randint(len(points), (count - len(points),), generator=generator).to(points.device)
            noise = torch.randn(len(rest), points.shape[1], generator=generator).to(points.device)
            chosen = torch.cat([chosen, points[rest] + 0.01 * points.std(dim=0, correction=0) * noise])
        return chosen

    centers = sample(num_clusters)
    for _ in range(iterations):
        assigned = nearest_code(points, centers)
        counts = torch.bincount(assigned, minlength=num_clusters)
        centers = torch.zeros_like(centers).index_add_(0, assigned, points) / counts.clamp(min=1)[:, None]
        empty = counts == 0
        centers[empty] = sample(int(empty.sum()))
    return centers


class _StraightThrough(torch.autograd.Function):
    """Forward: the code itself. Backward: the gradient passes to the latent as if nothing had happened.

    Writing this as z + (q - z).detach() would round: in bfloat16 a third or more of the values come out unequal to q.
    """

    @staticmethod
    def forward(ctx, latents: Tensor, quantized: Tensor) -> Tensor:
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


class Quantizer(nn.Module):
    """What every quantizer is to the model: `forward`, `codes`, `num_codes`, `loss_names`."""

    loss_names: tuple[str, ...] = ()

    def __init__(self, config: VQGANConfig):
        super().__init__()
        self.num_codes = config.num_vq_embeddings
        self.embed_dim = config.vq_embed_dim

    def forward(self, latents: Tensor) -> QuantizerOutput:
        raise NotImplementedError

    def codes(self, indices: Tensor) -> Tensor:
        """Codes at `indices`: `(B, h, w)` int64 to `(B, D, h, w)`."""
        raise NotImplementedError

    def flatten(self, latents: Tensor) -> Tensor:
        """`(B, D, h, w)` to `(B*h*w, D)`, refusing what no quantizer can answer."""
        if latents.ndim != 4 or latents.shape[1] != self.embed_dim:
            raise ValueError(f"latents of shape {tuple(latents.shape)}: expected (B, {self.embed_dim}, h, w).")
        if latents.numel() == 0:
            raise ValueError(f"latents of shape {tuple(latents.shape)} are empty: there is nothing to quantize.")
        if not torch.compiler.is_compiling() and not torch.isfinite(latents).all():
            bad = int((~torch.isfinite(latents)).sum())
            raise ValueError(
                f"{bad} of {latents.numel()} latent values are NaN or infinite. Check the input image; in training, "
                "lower the learning rate."
            )
        return latents.permute(0, 2, 3, 1).reshape(-1, self.embed_dim)


class Codebook(nn.Embedding):
    """K codes of dimension D, `weight` `(K, D)`, started as taming-transformers and diffusers do, at U(±1/K)."""

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.weight, -1 / self.num_embeddings, 1 / self.num_embeddings)


class VectorQuantizer(Quantizer):
    r"""
    A learned codebook (VQ-VAE, https://huggingface.co/papers/1711.00937): z is replaced by its nearest code e,

        e = argmin_e |z - e|²                                        (eqs. 1 and 2)
        commitment = |z - sg(e)|²,   codebook = |sg(z) - e|²         (eq. 3; means over elements, sg stops the gradient)

    and the decoder's gradient is copied from e to z (straight-through). Choose it for small codebooks, as the
    textbook case, and to stay loadable by `diffusers.VQModel`; start it from data (`initialize_codebook`), or most of
    a large codebook is never used.
    """

    loss_names = ("commitment", "codebook")

    def __init__(self, config: VQGANConfig):
        super().__init__(config)
        self.embedding = Codebook(self.num_codes, self.embed_dim)

    def forward(self, latents: Tensor) -> QuantizerOutput:
        vectors = self.flatten(latents)
        batch, _, height, width = latents.shape
        indices = nearest_code(vectors, self.embedding.weight).view(batch, height, width)
        codes = self.codes(indices)
        precision = torch.promote_types(latents.dtype, torch.float32)
        z, e = latents.to(precision), codes.to(precision)
        losses = {"commitment": F.mse_loss(z, e.detach()), "codebook": F.mse_loss(e, z.detach())}
        return QuantizerOutput(_StraightThrough.apply(latents, codes.to(latents.dtype)), indices, losses)

    def codes(self, indices: Tensor) -> Tensor:
        return self.embedding(indices).permute(0, 3, 1, 2)

    def to_codebook(self) -> Tensor:
        """`(K, D)`: the plain codebook whose nearest code is this quantizer's choice."""
        return self.embedding.weight.detach()

    @torch.no_grad()
    def initialize_codebook(self, latents: Tensor, generator: torch.Generator | None = None) -> None:
        """Start the codebook as the k-means of `latents` `(N, D)`; with the same arguments, the same on every process."""
        self.embedding.weight.copy_(kmeans(latents, self.num_codes, generator=generator))

    @torch.no_grad()
    def restart_codes(self, dead: Tensor, latents: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """
        Move codes marked in `dead` `(K,)` bool onto distinct, randomly drawn rows of `latents` `(N, D)`.

        Returns:
            `Tensor` `(K,)` bool: the codes that were moved; not all of `dead` if there are more of them than latents.
        """
        restarted = torch.zeros_like(dead)
        restarted[dead.nonzero().flatten()[: len(latents)]] = True
        drawn = torch.randperm(len(latents), generator=generator)[: int(restarted.sum())].to(latents.device)
        self.embedding.weight[restarted] = latents[drawn].to(self.embedding.weight.dtype)
        return restarted


QUANTIZERS: dict[str, type[Quantizer]] = {"vq": VectorQuantizer}
