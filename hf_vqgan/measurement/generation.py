"""
How close generated images are to real ones as a distribution: distances, precision and recall, copies.

Pure functions of feature vectors, `(N, F)` for N images, which may come from any network. Everything is computed in
float64, a block of rows at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .frechet import FeatureMoments, Gaussian, frechet_distance

BLOCK = 1024  # rows of a distance matrix that exist at a time
KERNEL_SUBSETS, KERNEL_SUBSET_SIZE = 100, 1000  # usual for KID
NEIGHBOURS = 3  # usual for precision and recall


@dataclass(frozen=True)
class DistributionMeasures:
    """
    Generated images against real ones. What the reference or the number of images does not allow is `None`.

    Args:
        frechet_distance (`float`, *optional*): Squared, between Gaussians fitted to the features.
        kernel_distance, kernel_distance_std (`float`, *optional*): Mean and standard deviation over subsets.
        precision (`float`, *optional*): Share of generated images that lie where real ones are.
        recall (`float`, *optional*): Share of real images that lie where generated ones are.
    """

    frechet_distance: float | None = None
    kernel_distance: float | None = None
    kernel_distance_std: float | None = None
    precision: float | None = None
    recall: float | None = None


def compare_distributions(
    made: Tensor, real: Tensor | None, real_gaussian: FeatureMoments | Gaussian | None = None, seed: int = 2020
) -> DistributionMeasures:
    """
    All measures that two sets of features allow.

    Args:
        made (`Tensor` of shape `(N, F)`): Of generated images.
        real (`Tensor` of shape `(M, F)`, *optional*): Of real images. Without them there is only a Fréchet distance.
        real_gaussian (*optional*): For the Fréchet distance, if not those of `real`.
        seed (`int`): Draws the subsets of the kernel distance.
    """
    if real_gaussian is None and real is not None and len(real) > 1:
        real_gaussian = moments_of(real)
    if real_gaussian is None or len(made) < 2:
        return DistributionMeasures()
    frechet = frechet_distance(real_gaussian, moments_of(made))
    if real is None or min(len(made), len(real)) <= NEIGHBOURS:
        return DistributionMeasures(frechet)
    kernel = kernel_distance(made, real, subset_size=default_subset_size(len(made), len(real)), seed=seed)
    return DistributionMeasures(frechet, *kernel, *precision_recall(made, real))


def moments_of(features: Tensor) -> FeatureMoments:
    """[`FeatureMoments`] of all rows of `(N, F)`."""
    moments = FeatureMoments(features.shape[1])
    for block in features.split(BLOCK):
        moments.update(block)
    return moments


# ---------------------------------------------------------------------------------------------------------------------
# Kernel distance


def default_subset_size(num_made: int, num_real: int) -> int:
    """1000, or half of the smaller set: subsets of all images would be equal and show no deviation."""
    return max(2, min(KERNEL_SUBSET_SIZE, num_made // 2, num_real // 2))


def kernel_distance(
    made: Tensor,
    real: Tensor,
    subsets: int = KERNEL_SUBSETS,
    subset_size: int = KERNEL_SUBSET_SIZE,
    seed: int = 2020,
) -> tuple[float, float]:
    """
    Unbiased MMD² with the kernel (a·b/F + 1)³, which is KID where the features are Inception's
    (https://huggingface.co/papers/1801.01401). Its expectation does not depend on the number of images, and it can be
    negative. Subsets are drawn as torch-fidelity draws them.

    Returns:
        `(float, float)`: Mean and standard deviation over `subsets` random subsets of both sets.

    Raises:
        ValueError: if one of the sets is smaller than a subset, or a subset smaller than two images.
    """
    if not 2 <= subset_size <= min(len(made), len(real)):
        raise ValueError(
            f"subset_size={subset_size} must be at least 2 and at most the number of images: {len(made)} generated, "
            f"{len(real)} real."
        )
    draws = np.random.RandomState(seed)
    found = []
    for _ in range(subsets):
        ours, theirs = (rows[draws.choice(len(rows), subset_size, replace=False)].double() for rows in (made, real))
        within = _mean_off_diagonal(_cubic_kernel(ours, ours)) + _mean_off_diagonal(_cubic_kernel(theirs, theirs))
        found.append(within - 2 * _cubic_kernel(ours, theirs).mean())
    distances = torch.stack(found)
    return float(distances.mean()), float(distances.std(correction=0))


def _cubic_kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _mean_off_diagonal(matrix: Tensor) -> Tensor:
    count = len(matrix)
    return (matrix.sum() - matrix.diagonal().sum()) / (count * (count - 1))


# ---------------------------------------------------------------------------------------------------------------------
# Neighbours


def precision_recall(made: Tensor, real: Tensor, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """
    Improved precision and recall (https://huggingface.co/papers/1904.06991): the share of generated images inside the
    real ones' manifold, and of real images inside the generated ones'. The manifold of a set is the union of balls
    around its members, each as large as the distance to the member's k-th nearest neighbour.

    Args:
        neighbours (`int`): k.

    Returns:
        `(float, float)`: Precision and recall, in [0, 1].

    Raises:
        ValueError: if one of the sets has no k-th neighbour.
    """
    if min(len(made), len(real)) <= neighbours:
        raise ValueError(
            f"precision and recall with {neighbours} neighbours need more images than that, and there are {len(made)} "
            f"generated and {len(real)} real ones."
        )
    return _share_inside(made, real, neighbours), _share_inside(real, made, neighbours)


def _share_inside(queries: Tensor, members: Tensor, neighbours: int) -> float:
    """The share of `queries` inside the manifold of `members`."""
    radii = []
    for start, squares in _distance_blocks(members, members):
        rows = torch.arange(len(squares), device=squares.device)
        squares[rows, start + rows] = torch.inf  # nobody is a neighbour of itself
        radii.append(squares.kthvalue(neighbours, dim=1).values)
    radius = torch.cat(radii)
    inside = [(squares <= radius).any(dim=1) for _, squares in _distance_blocks(queries, members)]
    return float(torch.cat(inside).double().mean())


def nearest(queries: Tensor, references: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
    """
    The `count` nearest of `references` `(M, F)` to each of `queries` `(N, F)`.

    Returns:
        `(Tensor, Tensor)`: Euclidean distances, ascending, and row numbers, each `(N, min(count, M))`.
    """
    found = [
        squares.topk(min(count, len(references)), dim=1, largest=False)
        for _, squares in _distance_blocks(queries, references)
    ]
    return torch.cat([one.values for one in found]).sqrt(), torch.cat([one.indices for one in found])


def memorization_ratio(made: Tensor, held_out: Tensor, train: Tensor) -> float:
    """
    How close generated images are to the nearest training image, in units of what held-out images are: ratio of the
    medians. About 1 or more: no closer than new real images are. Close to 0: copies.

    Returns:
        `float`: `inf` where half of the held-out images are training images, too, and the generated ones are not; 1
        where both are.
    """
    ours, theirs = (float(nearest(rows, train)[0].median()) for rows in (made, held_out))
    if theirs == 0:
        return 1.0 if ours == 0 else float("inf")
    return ours / theirs


def _distance_blocks(queries: Tensor, references: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Squared distances of `queries` to all `references`, by blocks of rows, each with the number of its first row."""
    centre = references.double().mean(dim=0)  # a common offset would cost digits
    references = references.double() - centre
    squares = references.square().sum(dim=1)
    for start in range(0, len(queries), BLOCK):
        block = queries[start : start + BLOCK].double() - centre
        yield start, (block.square().sum(dim=1, keepdim=True) + squares - 2 * block @ references.T).clamp(min=0)
