"""
Train a latent diffusion model on a VQ-GAN's latents.

    hf-vqgan train-diffusion --vqgan runs/mine --dataset_name user/images
    hf-vqgan train-diffusion --vqgan runs/mine --dataset_name latents --class_column label
    hf-vqgan train-diffusion --vqgan runs/mine --dataset_name latents --denoiser dit

The dataset holds images, or what `hf-vqgan encode` made of them. Values come from the dataclass in
hf_vqgan/generation/denoisers.py, overridden by a recipe (--config), by flags. The same command again resumes. Flags of
`accelerate launch`, such as --num_processes, are taken, too.
"""

from ..generation.denoisers import LatentDiffusionConfig
from ..generation.diffusion import train_latent_diffusion
from ..training.arguments import RecipeParser, errors_in_one_line, training_parser


def make_parser() -> RecipeParser:
    return training_parser((LatentDiffusionConfig,), __doc__)


def main() -> None:
    parser = make_parser()
    with errors_in_one_line():
        config, flags = parser.parse()
        train_latent_diffusion(config, dry_run=flags.dry_run)
