#!/usr/bin/env python
"""
Train a latent diffusion model on a VQ-GAN's latents with Accelerate.

    accelerate launch scripts/train_latent_diffusion.py --vqgan runs/mine --dataset_name user/images
    accelerate launch scripts/train_latent_diffusion.py --vqgan runs/mine --dataset_name latents --class_column label
    accelerate launch scripts/train_latent_diffusion.py --vqgan runs/mine --dataset_name latents --denoiser dit

The dataset holds images, or what encode_dataset.py made of them. Values come from the dataclass in
hf_vqgan/generation/diffusion.py, overridden by a recipe (--config), by flags. The same command again resumes.
"""

from hf_vqgan.generation.denoisers import LatentDiffusionConfig
from hf_vqgan.generation.diffusion import train_latent_diffusion
from hf_vqgan.training.arguments import RecipeParser, errors_in_one_line


def main() -> None:
    parser = RecipeParser((LatentDiffusionConfig,))
    parser.add_argument("--dry_run", action="store_true", help="Check everything, print the plan, train nothing.")
    with errors_in_one_line():
        config, flags = parser.parse()
        train_latent_diffusion(config, dry_run=flags.dry_run)


if __name__ == "__main__":
    main()
