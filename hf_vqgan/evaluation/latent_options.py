"""How a latent space is analysed."""

from dataclasses import dataclass

from ..files.options import MAX_SEED, check_values, option
from ..losses.lpips_weights import NETWORKS

GROUP_NAMES = ("smoothness", "lipschitz", "holes", "robustness", "codes", "equivariance", "spectrum", "probe",
               "dimension", "diffusability")  # fmt: skip


@dataclass
class LatentAnalysisConfig:
    """How a latent space is analysed. Every field is a flag of `hf-vqgan analyze`."""

    # What is measured
    measures: list[str] = option(
        [], "Groups of measures. Default: all but diffusability, which takes long.", choices=GROUP_NAMES
    )
    output_dir: str = option(
        "runs/latent_space", "Folder for latent_space.json, report.md and pictures.", nonempty=True
    )
    compare: list[str] = option([], "Models to compare with: folders of earlier reports, or models to analyse first.")
    seed: int = option(0, "Seed of all that is drawn at random.", at_least=0, at_most=MAX_SEED)

    # On which images
    split: str | None = option(None, "Split. Default: `validation`, else `test`, else the only one.")
    max_samples: int = option(
        64, "Images, drawn at random from the split. Kept in memory, with their latents.", at_least=8
    )
    resolution: int | None = option(
        None, "Side in pixels of the central square. Default: the model's sample_size.", at_least=1
    )
    resize: int | None = option(
        None, "Shorter side before cropping. Default: resolution. 0: keep the image's size.", at_least=0
    )
    image_column: str | None = option(None, "Column with the images. Default: the only image column.")
    label_column: str | None = option(None, "Column for the linear probe. Default: the only column of class labels.")
    dataset_config_name: str | None = option(None, "Configuration of the dataset.")
    dataset_revision: str | None = option(None, "Branch, tag or commit of a Hub dataset.")
    cache_dir: str | None = option(None, "Where `datasets` keeps what it downloads.")

    # With what
    perceptual_net: str = option("alex", "LPIPS network.", choices=tuple(NETWORKS))
    perceptual_weights_path: str | None = option(None, "LPIPS trunk. Default: the cache, torchvision, a package index.")
    feature_extractor: str = option(
        "auto", "Of Fréchet distances. auto: Inception if its path is given, else LPIPS.",
        choices=("auto", "inception", "lpips"),
    )  # fmt: skip
    inception_weights_path: str | None = option(None, "torch-fidelity's Inception weights. Default: cache or download.")
    batch_size: int = option(16, "Images per forward pass.", at_least=1)

    # How
    path_steps: int = option(16, "Steps of an interpolation between two images.", at_least=1)
    path_epsilon: float = option(1e-3, "ε of the perceptual path length of continuous latents.", above=0)
    replaced_share: float = option(0.1, "Share of tokens that pFID replaces.", above=0, at_most=1)
    replaced_neighbours: int = option(8, "By one of so many nearest codes.", at_least=1)
    lipschitz_images: int = option(16, "Images at which the decoder's Lipschitz constant is taken.", at_least=1)
    lipschitz_iterations: int = option(10, "Power iterations.", at_least=1)
    consistency_contexts: int = option(16, "Images in which codes are exchanged.", at_least=1)
    consistency_codes: int = option(24, "Codes that are compared in each.", at_least=1)
    diffusion_steps: int = option(500, "Training steps of the diffusability measure.", at_least=1)
    diffusion_train_split: str = option("train", "Split that it trains on.")

    def __post_init__(self):
        check_values(self)
