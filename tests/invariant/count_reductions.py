"""
Run under two processes: counts how often a step with accumulation exchanges each network's gradients.

    torchrun --nproc_per_node 2 count_reductions.py FOLDER_OF_IMAGES TRUNK MIXED_PRECISION
"""

import json
import sys

import torch
from conftest import TINY

from hf_vqgan import VQGANConfig
from hf_vqgan.training.configuration import VQGANTrainingConfig
from hf_vqgan.training.networks import build_state, load_lpips
from hf_vqgan.training.setup import build_accelerator
from hf_vqgan.training.step import training_step

MICRO_BATCHES = 3


def count_reductions(folder: str, trunk: str, mixed_precision: str) -> dict[str, int]:
    """Gradient values exchanged per step and network, as multiples of the network's number of parameters."""
    config = VQGANTrainingConfig(
        dataset_name=folder, resolution=32, max_train_steps=9, gradient_accumulation_steps=MICRO_BATCHES,
        perceptual_net="alex", perceptual_weights_path=trunk, disc_channels=8, disc_layers=1, cpu_threads=1,
        mixed_precision=mixed_precision,
    )  # fmt: skip
    accelerator = build_accelerator(config)
    state = build_state(config, VQGANConfig(**TINY), accelerator, load_lpips(config, accelerator)[0])
    exchanged = {"model": 0, "discriminator": 0}

    def count(name: str, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        exchanged[name] += bucket.buffer().numel()
        return torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda f: f.value()[0])

    for name in exchanged:
        getattr(state, name).register_comm_hook(name, count)
    micro_batches = list(torch.rand(MICRO_BATCHES, 2, 3, 32, 32) * 2 - 1)
    steps = 3
    for _ in range(steps):
        training_step(state, micro_batches)
    sizes = {name: sum(p.numel() for p in getattr(state, name).parameters() if p.requires_grad) for name in exchanged}
    return {name: exchanged[name] / sizes[name] / steps for name in exchanged}


if __name__ == "__main__":
    counts = count_reductions(*sys.argv[1:])
    if torch.distributed.get_rank() == 0:
        print(json.dumps(counts))
    torch.distributed.destroy_process_group()
