"""Few runs that contain every pair of settings: most bugs of configurable programs need two settings to meet."""

import itertools
import random
from collections.abc import Collection, Mapping

Setting = tuple[str, str]  # factor, value


def all_pairs(
    factors: Mapping[str, Collection[str]], impossible: Collection[frozenset[Setting]] = (), candidates: int = 20
) -> list[dict[str, str]]:
    """
    Rows with a value per factor, such that every pair of values of two factors is in some row.

    Greedy: each row starts from a pair that no row has yet and goes on, factor by factor, with the value that adds most
    new pairs; of several candidates the best is kept. Where values add equally, the first one is taken: list cheap ones
    first. The same arguments give the same rows.

    Args:
        impossible: Pairs that exclude each other, as `frozenset({(factor, value), (factor, value)})`.

    Raises:
        ValueError: if a pair that is not impossible itself fits into no row.
    """
    rng = random.Random(0)
    names = list(factors)
    missing = {
        pair
        for a, b in itertools.combinations(names, 2)
        for pair in map(frozenset, itertools.product([(a, v) for v in factors[a]], [(b, v) for v in factors[b]]))
        if pair not in impossible
    }
    rows = []
    while missing:
        first = sorted(missing, key=sorted)
        built = [grow_row(sorted(rng.choice(first)), factors, missing, impossible, rng) for _ in range(candidates)]
        best = max(
            (row for row in built if row is not None), key=lambda row: len(pairs_of(row) & missing), default=None
        )
        if best is None:
            raise ValueError(f"these pairs fit into no row: {[sorted(pair) for pair in first]}.")
        missing -= pairs_of(best)
        rows.append({name: best[name] for name in names})
    return rows


def grow_row(
    start: Collection[Setting],
    factors: Mapping[str, Collection[str]],
    missing: set[frozenset[Setting]],
    impossible: Collection[frozenset[Setting]],
    rng: random.Random,
) -> dict[str, str] | None:
    """A row with the settings of `start`, or `None` if a factor is left without a possible value."""
    row = dict(start)
    rest = [name for name in factors if name not in row]
    rng.shuffle(rest)
    for name in rest:
        possible = [
            value
            for value in factors[name]
            if not any(frozenset({(name, value), other}) in impossible for other in row.items())
        ]
        if not possible:
            return None
        news = [sum(frozenset({(name, value), other}) in missing for other in row.items()) for value in possible]
        row[name] = possible[news.index(max(news))]
    return row


def pairs_of(row: Mapping[str, str]) -> set[frozenset[Setting]]:
    return set(map(frozenset, itertools.combinations(row.items(), 2)))


def random_rows(
    factors: Mapping[str, Collection[str]], impossible: Collection[frozenset[Setting]], count: int, seed: int
) -> list[dict[str, str]]:
    """Possible rows drawn at random, for what takes three settings to meet."""
    rng = random.Random(seed)
    rows: list[dict[str, str]] = []
    while len(rows) < count:
        row = {name: rng.choice(list(values)) for name, values in factors.items()}
        if not pairs_of(row) & set(impossible):
            rows.append(row)
    return rows
