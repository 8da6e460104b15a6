"""Random numbers that depend neither on the number of processes nor on interruptions."""

import random

import torch


def rng(seed: int, purpose: str, *numbers: int) -> random.Random:
    """
    The generator of what is random about one thing, such as a sample: a function of the run's seed, the purpose, and
    the number of the thing. Different purposes and numbers share nothing, which sums of seeds and numbers would.
    """
    return random.Random(" ".join([str(seed), purpose, *map(str, numbers)]))  # hashed with SHA-512


def torch_rng(seed: int, purpose: str, *numbers: int) -> torch.Generator:
    """`rng` for tensors, on the CPU."""
    return torch.Generator().manual_seed(rng(seed, purpose, *numbers).getrandbits(32))  # it takes 32 bits
