"""Which code is nearest, and codes to start from: exact, in float32 or better, in bounded memory.

Shapes: N vectors and K codes of D numbers.
"""

import torch
from torch import Tensor


def nearest_code(vectors: Tensor, codebook: Tensor, tile: int = 1024) -> Tensor:
    """
    Index of the nearest code in Euclidean distance, ties to the lowest index.

    Minimises ½|e|² - z·e, which orders codes as |z - e|² does. Leaving |z|² out is not (only) cheaper: added in
    float32 it swamps the differences between small codes and picks wrong ones. As one product [z, 1]·[-e, ½|e|²] the
    scores are written once; at most `tile`² of them exist at a time. A reduction that only finds minima is twice as
    fast as one that also tells where they are, so the first pass finds each vector's best tile, and the second
    its best code there.

    Args:
        vectors (`Tensor` of shape `(N, D)`): z, any float dtype; compared in float32 (float64 stays).
        codebook (`Tensor` of shape `(K, D)`): e.

    Returns:
        `Tensor` of shape `(N,)`, int64.
    """
    dtype = torch.promote_types(vectors.dtype, torch.float32)
    with torch.no_grad(), torch.autocast(vectors.device.type, enabled=False):
        vectors, codebook = vectors.to(dtype), codebook.to(dtype)
        z = torch.cat([vectors, vectors.new_ones(len(vectors), 1)], dim=1)
        tiles = codebook.split(tile)
        buffer = z.new_empty(min(len(z), tile) * len(tiles[0]))

        def with_norms(codes: Tensor) -> Tensor:
            return torch.cat([-codes, 0.5 * codes.square().sum(dim=1, keepdim=True)], dim=1)

        def scores(rows: Tensor, codes: Tensor) -> Tensor:
            return torch.mm(rows, codes.T, out=buffer[: len(rows) * len(codes)].view(len(rows), len(codes)))

        if len(tiles) == 1:
            codes = with_norms(codebook)
            return torch.cat([scores(rows, codes).argmin(dim=1) for rows in z.split(tile)])
        best = z.new_full((len(z),), torch.inf)
        best_tile = torch.zeros(len(z), dtype=torch.int64, device=z.device)
        for number, codes in enumerate(map(with_norms, tiles)):
            for rows, low, chosen in zip(z.split(tile), best.split(tile), best_tile.split(tile), strict=True):
                score = scores(rows, codes).amin(dim=1)
                chosen.masked_fill_(score < low, number)  # strictly: an equal code of an earlier tile stays
                torch.minimum(low, score, out=low)

        indices = torch.empty_like(best_tile)
        members_of_tiles = best_tile.argsort().split(best_tile.bincount(minlength=len(tiles)).tolist())
        for number, members in enumerate(members_of_tiles):
            if len(members):
                codes = with_norms(tiles[number])
                for some in members.split(tile):
                    indices[some] = scores(z[some], codes).argmin(dim=1) + number * tile
    return indices


def kmeans_plus_plus(points: Tensor, num_clusters: int, generator: torch.Generator | None = None) -> Tensor:
    """
    Starting centres drawn one by one, each with probability proportional to its squared distance from those before
    (Arthur & Vassilvitskii 2007). `(N, D)` to `(K, D)`; needs K <= N.
    """
    chosen = torch.empty(num_clusters, dtype=torch.int64)
    chosen[0] = torch.randint(len(points), (), generator=generator)
    distance = torch.full((len(points),), torch.inf, device=points.device)
    for number in range(1, num_clusters):
        distance = torch.minimum(distance, (points - points[chosen[number - 1]]).square().sum(dim=1))
        # Inverse transform sampling: multinomial is limited to 2^24 points and slower.
        mass = distance.double().cumsum(dim=0)
        target = torch.rand((), generator=generator, dtype=torch.float64) * mass[-1].cpu()
        chosen[number] = torch.searchsorted(mass, target.to(mass.device)).clamp_(max=len(points) - 1)
    return points[chosen.to(points.device)]


def kmeans(points: Tensor, num_clusters: int, iterations: int = 10, generator: torch.Generator | None = None) -> Tensor:
    """
    Lloyd's algorithm; a cluster that loses all its points restarts at a random one.

    Starts from k-means++ up to 2048 clusters, from a random subset of the points above, where drawing one by one would
    take longer than the iterations that make up for it.

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

    one_by_one = num_clusters <= min(2048, len(points))
    centers = kmeans_plus_plus(points, num_clusters, generator) if one_by_one else sample(num_clusters)
    for _ in range(iterations):
        counts, sums = cluster_sums(points, nearest_code(points, centers), num_clusters)
        centers = sums / counts.clamp(min=1)[:, None]
        empty = counts == 0
        centers[empty] = sample(int(empty.sum()))
    return centers


def cluster_sums(vectors: Tensor, indices: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """Number `(K,)` and sum `(K, D)` of the vectors `(N, D)` at each index `(N,)`."""
    counts = torch.bincount(indices, minlength=num_clusters).to(vectors.dtype)
    return counts, vectors.new_zeros(num_clusters, vectors.shape[1]).index_add_(0, indices, vectors)
