"""
Measures of a latent space: is it smooth, without holes, robust, structured? How well images are reconstructed is
another question (`metrics.py`): a model can be good at one and bad at the other.

Every measure is a function of tensors and of the networks it needs, given as callables, so that it can be tried on any
autoencoder and on toys with known answers. It returns one figure per image, pair or path, for `bootstrap` to average;
where only a set has a figure (Fréchet distance, correlation), it returns that. `latent_measures.py` runs them all.

Shapes: B images or pairs, x pixels `(B, 3, H, W)` in [-1, 1], z latents `(B, D, h, w)`, K codes, n codebooks, `indices`
`(B, h, w, n)`. `decode` maps z to x, `encode` x to z. Distances are squared ones, as LPIPS is.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchmetrics.functional.regression import spearman_corrcoef

from ..losses.image_losses import LPIPS

Network = Callable[[Tensor], Tensor]


@dataclass
class Measure:
    """
    One figure of a latent space.

    Args:
        value (`float`): The figure.
        low, high (`float`): Its 95 % confidence interval (`bootstrap`).
        unit (`str`): What it is counted in.
        better (`str`, *optional*): `"higher"` or `"lower"`; `None` where neither is better by itself.
        n (`int`): Independent images, pairs, ... that the interval is over.
        protocol (`dict`): What exactly was done: an id, and settings. Figures of different protocols cannot be
            compared.
    """

    value: float
    low: float
    high: float
    unit: str
    better: str | None
    n: int
    protocol: dict


class PixelDistance:
    """Mean squared difference of pixels, with the interface of `LPIPS`."""

    def features(self, pixel_values: Tensor) -> list[Tensor]:
        return [pixel_values]

    def distance(self, features: list[Tensor], other: list[Tensor]) -> Tensor:
        return (features[0] - other[0]).square().flatten(1).mean(dim=1)

    def __call__(self, sample: Tensor, target: Tensor) -> Tensor:
        return self.distance([sample], [target])


Distance = LPIPS | PixelDistance


def bootstrap(
    statistic: Callable[..., float], *samples: Tensor, resamples: int = 1000, seed: int = 0, recentre: bool = False
) -> tuple[float, float, float]:
    """
    `statistic(*samples)` and its 95 % confidence interval: percentiles over resamplings, with replacement, of the rows
    of `samples`, together.

    Args:
        recentre (`bool`): Shift the interval so that the resamplings' mean falls on the value. For statistics that
            resampling itself moves: a Fréchet distance grows, because a resampling holds fewer different images.

    Returns:
        `(float, float, float)`: Value, lower and upper bound.
    """
    generator = torch.Generator().manual_seed(seed)
    count = len(samples[0])
    value = float(statistic(*samples))
    draws = []
    for _ in range(resamples):
        rows = torch.randint(count, (count,), generator=generator).to(samples[0].device)
        draws.append(float(statistic(*(sample[rows] for sample in samples))))
    draws = torch.tensor(draws, dtype=torch.float64)
    shift = value - draws.mean() if recentre else 0.0
    low, high = torch.quantile(draws + shift, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return value, low, high


# ---------------------------------------------------------------------------------------------------------------------
# Smoothness


def lerp(start: Tensor, end: Tensor, t: Tensor) -> Tensor:
    """(1 - t) start + t end, for `t` `(B,)`."""
    t = t.view(-1, *[1] * (start.ndim - 1))
    return (1 - t) * start + t * end


def slerp(start: Tensor, end: Tensor, t: Tensor) -> Tensor:
    r"""
    Spherical interpolation about the origin of whole latents, for `t` `(B,)`:

        sin((1 - t) ω) / sin ω · start + sin(t ω) / sin ω · end,   ω the angle between them,

    which keeps the length that latents have: the middle of a straight line between two of many dimensions is shorter by
    up to √½, where the decoder has never been. `lerp` where the two are parallel.
    """
    t = t.view(-1, *[1] * (start.ndim - 1))
    cosine = F.cosine_similarity(start.flatten(1), end.flatten(1)).clamp(-1, 1).view_as(t[: len(start)])
    angle = cosine.acos()
    parallel = angle.sin() < 1e-4
    sine = torch.where(parallel, 1.0, angle.sin())
    first = torch.where(parallel, 1 - t, ((1 - t) * angle).sin() / sine)
    return first * start + torch.where(parallel, t, (t * angle).sin() / sine) * end


def path_length(
    decode: Network,
    distance: Distance,
    start: Tensor,
    end: Tensor,
    t: Tensor,
    epsilon: float,
    interpolate: Callable[[Tensor, Tensor, Tensor], Tensor] = slerp,
) -> Tensor:
    """
    Perceptual path length (StyleGAN, https://huggingface.co/papers/1812.04948, eq. 2): d(D(z(t)), D(z(t + ε))) / ε²,
    the squared speed in perceptual distance at which the image changes on the way from `start` to `end`. `(B,)`.

    Independent of the latents' scale. Lower is smoother; a decoder that ignores z has 0. Through a quantizer the limit
    ε → 0 does not exist (the image stands still or jumps), so figures with different ε are different measures.
    """
    near, far = (decode(interpolate(start, end, at)) for at in (t, t + epsilon))
    return distance(near, far) / epsilon**2


def path_steps(
    decode: Network,
    distance: Distance,
    start: Tensor,
    end: Tensor,
    steps: int,
    interpolate: Callable[[Tensor, Tensor, Tensor], Tensor] = slerp,
) -> tuple[Tensor, Tensor]:
    """
    Lengths √d of the `steps` equal steps in t from `start` to `end`, `(B, steps)`, and of the chord between their two
    images, `(B,)`. √LPIPS is a Euclidean distance of features, so the path is never shorter than its chord.
    """
    t = torch.linspace(0, 1, steps + 1, device=start.device)
    lengths, chords = [], []
    for first, last in zip(start.split(1), end.split(1), strict=True):
        frames = interpolate(first.expand(steps + 1, *first.shape[1:]), last.expand(steps + 1, *last.shape[1:]), t)
        features = distance.features(decode(frames))
        lengths.append(distance.distance([f[:-1] for f in features], [f[1:] for f in features]))
        chords.append(distance.distance([f[:1] for f in features], [f[-1:] for f in features]))
    return torch.stack(lengths).sqrt(), torch.cat(chords).sqrt()


def straightness(lengths: Tensor, chords: Tensor) -> Tensor:
    """Chord over path length, `(B,)` in [0, 1]: 1 if the image changes in a straight line, NaN if not at all."""
    return chords / lengths.sum(dim=1)


def jump_share(lengths: Tensor, factor: float = 3.0) -> Tensor:
    """
    Share of a path's steps that are longer than `factor` times its mean step, `(B,)`. Lower is smoother. 0 if the image
    changes evenly; a single leap among S steps gives 1/S, so it is to be read beside the straightness.
    """
    return (lengths > factor * lengths.mean(dim=1, keepdim=True)).float().mean(dim=1)


def local_lipschitz(decode: Network, latents: Tensor, iterations: int = 10, seed: int = 0) -> Tensor:
    """
    Largest singular value of the decoder's Jacobian J = ∂x/∂z at each of `latents`, `(B,)`: the length by which the
    image (Euclidean norm over all pixels in [-1, 1]) changes per length of change in z, in the worst direction. Times
    the latents' standard deviation, models compare. Lower is smoother.

    Power iteration v ← JᵀJv / |JᵀJv|, which approaches the value from below. Jv comes from differentiating u ↦ Jᵀu, so
    any decoder that autograd knows will do; images of a batch must not influence one another.
    """
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the fused attentions have no second derivative
        z = latents.detach().clone().requires_grad_()
        pixels = decode(z)
        u = torch.zeros_like(pixels, requires_grad=True)
        (pulled,) = torch.autograd.grad(pixels, z, u, create_graph=True)  # Jᵀu, linear in u
        v = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed)).to(z)
        for _ in range(iterations):
            v = v / v.flatten(1).norm(dim=1).clamp_min(1e-30).view(-1, *[1] * (z.ndim - 1))
            (pushed,) = torch.autograd.grad(pulled, u, v, retain_graph=True)  # Jv
            (v,) = torch.autograd.grad(pixels, z, pushed, retain_graph=True)
    return pushed.flatten(1).norm(dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Holes


def nearest_neighbours(latents: Tensor, chunk: int = 256) -> Tensor:
    """For each of `latents` `(N, ...)` the number of the nearest other one (Euclidean, all positions), `(N,)`."""
    flat = latents.flatten(1)
    squares, nearest = flat.square().sum(dim=1), []
    for rows in torch.arange(len(flat), device=flat.device).split(chunk):
        scores = squares - 2 * flat[rows] @ flat.T  # |a - b|² less |a|²
        scores[torch.arange(len(rows)), rows] = torch.inf
        nearest.append(scores.argmin(dim=1))
    return torch.cat(nearest)


def neighbour_midpoints(latents: Tensor) -> Tensor:
    """
    Half-way (slerp) from each of `latents` to its nearest neighbour. How unlike real images their decodings are is iFID
    (https://huggingface.co/papers/2603.05630): a latent diffusion model lands between its training latents, so a hole
    there shows in what it generates.
    """
    return slerp(latents, latents[nearest_neighbours(latents)], torch.full((len(latents),), 0.5, device=latents.device))


def project(features: Tensor, dimension: int) -> Tensor:
    """
    `(N, F)` to `(N, dimension)`: orthogonal projection on random directions, the same every time, scaled so that
    squared distances keep their mean. A covariance needs several times more images than dimensions; with fewer, the
    Fréchet distance mostly counts images.
    """
    size = features.shape[1]
    if dimension >= size:
        return features
    directions = torch.randn(size, dimension, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = torch.linalg.qr(directions).Q * (size / dimension) ** 0.5
    return features.double() @ basis.to(features.device)


def kernel_distance(features: Tensor, other: Tensor) -> float:
    r"""
    Unbiased MMD² with the kernel (a·b/F + 1)³ of two paired sets `(N, F)` (KID,
    https://huggingface.co/papers/1801.01401; the estimator for pairs is eq. 4 of
    https://jmlr.org/papers/v13/gretton12a.html): whatever N, its expectation is that of infinitely many images, and
    equal sets have 0. Can be negative.
    """

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    features, other = features.double(), other.double()
    count = len(features)
    h = kernel(features, features) + kernel(other, other) - kernel(features, other) - kernel(other, features)
    return float((h.sum() - h.diagonal().sum()) / (count * (count - 1)))


# ---------------------------------------------------------------------------------------------------------------------
# Robustness


def nearest_codes(codebook: Tensor, numbers: Tensor, count: int, max_scores: int = 2**24) -> Tensor:
    """The `count` codes nearest to each of the codes `numbers` `(Q,)`, itself left out, nearest first: `(Q, count)`."""
    squares, nearest = codebook.square().sum(dim=1), []
    for rows in numbers.split(max(1, max_scores // len(codebook))):
        scores = squares - 2 * codebook[rows] @ codebook.T
        scores[torch.arange(len(rows)), rows] = torch.inf
        nearest.append(scores.topk(count, dim=1, largest=False).indices)
    return torch.cat(nearest)


def replace_tokens(
    indices: Tensor, codebooks: list[Tensor], share: float, neighbours: int, generator: torch.Generator
) -> Tensor:
    """
    `indices` `(B, h, w, n)` with `share` of every image's tokens, drawn at random, each replaced by one of the
    `neighbours` codes nearest to it, drawn evenly: the errors of a generator that samples tokens, as
    https://huggingface.co/papers/2503.08354 simulates them for pFID (rate α = `share`, strength δ = `neighbours`).

    Args:
        codebooks (`list[Tensor]`): Per codebook its codes `(K, D)`.
    """
    flat = indices.flatten(1, 2).clone()  # (B, hw, n)
    count = round(share * flat.shape[1])
    for column, codebook in enumerate(codebooks):
        tokens = flat[..., column]
        chosen = torch.rand(tokens.shape, generator=generator).argsort(dim=1)[:, :count].to(tokens.device)
        used, position = tokens.gather(1, chosen).unique(return_inverse=True)
        near = nearest_codes(codebook, used, min(neighbours, len(codebook) - 1))
        draw = torch.randint(near.shape[1], position.shape, generator=generator).to(tokens.device)
        tokens.scatter_(1, chosen, near[position, draw])
    return flat.view_as(indices)


def unchanged_share(indices: Tensor, other: Tensor) -> Tensor:
    """Share of equal codes per image, `(B,)`."""
    return (indices == other).flatten(1).double().mean(dim=1)


def level_noise(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """`pixels` in [-1, 1] with every channel of every pixel one of 255 levels up or down, at random."""
    sign = torch.randint(2, pixels.shape, generator=generator).to(pixels) * 2 - 1
    return (pixels + sign * (2 / 255)).clamp(-1, 1)


def shift_stability(encode_indices: Network, pixels: Tensor, shift: int, factor: int) -> Tensor:
    """
    Share of codes that stay when the camera moves by `shift` pixels, `(B,)`; right and down, averaged. Higher is
    better.

    Two crops of the image, f pixels narrower than it and `shift` apart, are encoded. Codes are compared where they
    cover the same content, to the nearest position: for less than f/2 pixels at the same place, for f one position
    further on.
    """
    shares = []
    for side in (2, 3):
        length = pixels.shape[side] - factor
        still, moved = (encode_indices(pixels.narrow(side, start, length)) for start in (0, shift))
        positions = int(shift / factor + 0.5 - 1e-9)
        kept = length // factor - positions
        shares.append(unchanged_share(still.narrow(side - 1, positions, kept), moved.narrow(side - 1, 0, kept)))
    return torch.stack(shares).mean(dim=0)


# ---------------------------------------------------------------------------------------------------------------------
# Structure


def exchange_code(context: Tensor, row: int, column: int, codes: Tensor) -> Tensor:
    """`context` `(1, h, w, n)` with each of `codes` `(M,)` of the first codebook at one position: `(M, h, w, n)`."""
    variants = context.repeat(len(codes), 1, 1, 1)
    variants[:, row, column, 0] = codes
    return variants


def neighbour_consistency(distance: Distance, images: Tensor, vectors: Tensor, chunk: int = 64) -> float:
    """
    Spearman's rank correlation, over all pairs of M codes, of the distance of their `vectors` `(M, D)` with that of
    `images` `(M, 3, H, W)`, which differ in that code alone. 1: near codes look alike, far ones different; 0: the
    distance says nothing. NaN if the images are all the same.
    """
    features = distance.features(images)
    first, second = torch.triu_indices(len(images), len(images), offset=1, device=images.device)
    parts = zip(first.split(chunk), second.split(chunk), strict=True)
    seen = torch.cat([distance.distance([f[a] for f in features], [f[b] for f in features]) for a, b in parts])
    apart = (vectors[first] - vectors[second]).square().sum(dim=1)
    if seen.max() == seen.min() or apart.max() == apart.min():
        return float("nan")
    return float(spearman_corrcoef(seen.float(), apart.float()))


def halve(images: Tensor) -> Tensor:
    """Half the side, bilinear and antialiased, of images or latents."""
    return F.interpolate(images, scale_factor=0.5, mode="bilinear", antialias=True)


def flip(images: Tensor) -> Tensor:
    return images.flip(3)


def turn(images: Tensor) -> Tensor:
    return images.rot90(1, (2, 3))


TRANSFORMS: dict[str, Network] = {"scale": halve, "flip": flip, "rotation": turn}


def equivariance_error(encode: Network, pixels: Tensor, latents: Tensor, transform: Network, std: float) -> Tensor:
    """
    Root mean square of E(Tx) - T E(x) in standard deviations of the latents, `(B,)`, given `latents` = E(x): what
    EQ-VAE (https://huggingface.co/papers/2502.09509, section 3) asks an encoder to bring to 0. Unrelated latents have
    √2.
    """
    return (encode(transform(pixels)) - transform(latents)).flatten(1).square().mean(dim=1).sqrt() / std


def _radial_frequency(height: int, width: int) -> Tensor:
    """|f| in cycles per sample of `torch.fft.fft2`'s coefficients, `(height, width)`."""
    return (torch.fft.fftfreq(height)[:, None].square() + torch.fft.fftfreq(width).square()).sqrt()


def _power(images: Tensor) -> Tensor:
    """Power spectrum summed over channels, each about its own mean: `(B, h, w)`."""
    centred = images.double() - images.double().mean(dim=(2, 3), keepdim=True)
    return torch.fft.fft2(centred).abs().square().sum(dim=1)


def high_frequency_share(images: Tensor) -> Tensor:
    """
    Share of the energy, without each channel's mean, above half the Nyquist frequency (|f| > 1/4), `(B,)`. White noise
    has about 1 - π/16 = 0.80. Latents with much more of it than images of their size have are hard to diffuse
    (https://huggingface.co/papers/2502.14831).
    """
    power = _power(images)
    high = (_radial_frequency(*images.shape[2:]) > 0.25).to(power.device)
    return (power * high).sum(dim=(1, 2)) / power.sum(dim=(1, 2))


def spectral_slope(images: Tensor) -> Tensor:
    """
    a of the least-squares fit log power = a log |f| + b over rings of one frequency step up to Nyquist, `(B,)`. White
    noise: 0; photographs: about -2.
    """
    power = _power(images)
    side = min(images.shape[2:])
    ring = (_radial_frequency(*images.shape[2:]) * side).round().long().to(power.device)
    rings = torch.arange(1, side // 2 + 1, device=power.device)
    means = torch.stack([power[:, ring == number].mean(dim=1) for number in rings], dim=1)  # (B, rings)
    x = rings.double().log()
    x = x - x.mean()
    return (means.clamp_min(1e-20).log() * x).sum(dim=1) / x.square().sum()


def participation_ratio(covariance: Tensor) -> float:
    """(Σλ)² / Σλ² of a covariance's eigenvalues: how many directions hold the variance. Between 1 and D."""
    return float(covariance.trace().square() / covariance.square().sum())


def linear_probe(features: Tensor, labels: Tensor, folds: int = 5, weight_decay: float = 0.01, seed: int = 0) -> Tensor:
    """
    Which of the images a linear classifier of `features` `(N, F)` gets right without having seen them, `(N,)` of 0 and
    1: logistic regression with loss + `weight_decay` / 2 |W|², trained to convergence on all folds but the image's own.
    Features are standardised by the training folds; folds hold equal shares of every class.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    order = order[labels[order].argsort(stable=True)]
    fold = torch.empty_like(labels)
    fold[order] = torch.arange(len(labels), device=labels.device) % folds
    correct = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
    for number in range(folds):
        train, test = fold != number, fold == number
        mean, std = features[train].mean(dim=0), features[train].std(dim=0) + 1e-8
        seen, unseen = ((features[part] - mean) / std for part in (train, test))
        # The best W lies in the span of the rows seen: with more features than rows, solve in their coordinates.
        axes = torch.linalg.svd(seen, full_matrices=False).Vh
        weight, bias = _logistic_regression(seen @ axes.T, labels[train], int(labels.max()) + 1, weight_decay)
        correct[test] = ((unseen @ axes.T @ weight + bias).argmax(dim=1) == labels[test]).double()
    return correct


def _logistic_regression(features: Tensor, labels: Tensor, classes: int, weight_decay: float) -> tuple[Tensor, Tensor]:
    weight = torch.zeros(features.shape[1], classes, device=features.device, requires_grad=True)
    bias = torch.zeros(classes, device=features.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(features @ weight + bias, labels) + weight_decay / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return weight.detach(), bias.detach()
