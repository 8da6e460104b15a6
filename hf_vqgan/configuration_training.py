"""Everything about a training run but the model's architecture."""

import dataclasses
from dataclasses import dataclass, field

from .discriminators import AUGMENTATIONS, DISCRIMINATORS
from .losses import ADVERSARIAL_LOSSES
from .lpips_weights import NETWORKS
from .regularizers import TRANSFORMS


def option(default, help: str, choices: tuple[str, ...] | None = None, role: str = "result"):
    """
    A field of the training configuration with the help text of its command-line flag.

    Args:
        role (`str`): What another value means. `"result"`: another run, as it changes what is learned or measured.
            `"watching"`: the same run, kept or looked at in another way. `"place"`: the same run on another machine or
            for another account; no file of the run names it. `"secret"`: the same, and it is never shown.
    """
    metadata = {"help": help, "role": role} | ({"choices": choices} if choices else {})
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata, repr=role != "secret")


def role_of(config_field: dataclasses.Field) -> str:
    """The field's role, as `option` describes them."""
    return config_field.metadata["role"]


def check_values(config, positive: tuple[str, ...] = (), not_negative: tuple[str, ...] = ()) -> None:
    """
    Check the named fields' signs, and of all fields with `choices` that their value, or each in their list, is one.

    Raises:
        ValueError: with field, value and expectation.
    """
    for name in positive:
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1.")
    for name in not_negative:
        if getattr(config, name) < 0:
            raise ValueError(f"{name}={getattr(config, name)} must not be negative.")
    for config_field in dataclasses.fields(config):
        choices, value = config_field.metadata.get("choices"), getattr(config, config_field.name)
        if choices and not set(value if isinstance(value, list) else [value]) <= set(choices):
            raise ValueError(f"{config_field.name}={value!r} must be one of {choices}.")


@dataclass
class VQGANTrainingConfig:
    """Everything about a training run but the model's architecture. Every field is a flag of `train_vqgan.py`."""

    # What a run reads and writes
    dataset_name: str = option("", "Hub dataset, local path that load_dataset reads, or package:NAME/FOLDER.")
    dataset_config_name: str | None = option(None, "Configuration of the dataset.")
    dataset_revision: str | None = option(None, "Branch, tag or commit of a Hub dataset.")
    extra_datasets: list[str] = option([], "More datasets to train on, named as dataset_name is.")
    dataset_weights: list[float] = option(
        [], "Share of the samples from dataset_name and from each of extra_datasets. Default: every image once."
    )
    train_split: str = option("train", "Split to train on.")
    validation_split: str | None = option(None, "Default: `validation`, else `test`, else images held out of train.")
    train_files: list[str] = option([], "Patterns of the training files inside the dataset. Default: all.")
    validation_files: list[str] = option([], "Patterns of the validation files inside the dataset.")
    image_column: str | None = option(None, "Column with the images. Default: the only image column.")
    max_train_samples: int | None = option(None, "Use only the first so many training images of each dataset.")
    max_validation_samples: int | None = option(64, "Use only the first so many validation images.")
    cache_dir: str | None = option(None, "Where `datasets` keeps what it downloads.", role="place")
    streaming: bool = option(False, "Read the training images as a stream, without downloading or indexing them first.")
    shuffle_buffer_size: int = option(1000, "Images of each stream among which the next one is drawn.")
    shard_groups: int = option(
        1, "Deal a stream's shards out to so many groups, so that processes read only their own."
    )
    output_dir: str = option("runs/vqgan", "Folder of the run: model, pictures, metrics and checkpoints.", role="place")
    overwrite_output_dir: bool = option(
        False, "Delete a run with other settings from output_dir. The same command again still resumes.", role="place"
    )
    resume_from_checkpoint: str | None = option(
        None,
        "`latest` (none yet: a new run), or a checkpoint folder. The same command run again resumes without it, too.",
        role="place",
    )

    init_from: str | None = option(
        None, "Start from a trained model: Hub id or folder. Model flags then override its config."
    )
    decoder_only: bool = option(False, "With init_from: train the decoder alone, so that all codes keep their meaning.")

    # From images to pixels
    resolution: int = option(256, "Side in pixels of the square crops to train on.")
    resize: int | None = option(None, "Shorter side before cropping. Default: resolution. 0: keep the image's size.")
    center_crop: bool = option(False, "Crop the centre instead of a random place.")
    random_flip: bool = option(True, "Mirror half of the crops.")
    crops_per_image: int = option(1, "Crops that one image yields per epoch.")
    validate_whole_images: bool = option(False, "Validate on whole images instead of their central square.")
    max_unreadable_share: float = option(
        0.2, "Stop when a larger share of the training images cannot be decoded.", role="watching"
    )
    dataloader_num_workers: int | None = option(
        None,
        "Processes that decode images, per training process. Default: its share of the cores but one, at most 8.",
        role="place",
    )

    # The three losses (losses.py) and their weights
    l1_weight: float = option(1.0, "Weight of |x̂ - x|: counts pixels.")
    l2_weight: float = option(0.0, "Weight of (x̂ - x)².")
    perceptual_weight: float = option(1.0, "Weight of LPIPS: compares features.")
    perceptual_net: str = option("vgg", "LPIPS network for training.", choices=tuple(NETWORKS))
    perceptual_weights_path: str | None = option(None, "File with the LPIPS network's weights. Default: fetched.")
    perceptual_upscale: int = option(1, "Enlarge crops this many times before LPIPS; 2 helps crops below 64 pixels.")
    adversarial_weight: float = option(0.8, "Weight of the adversarial loss: keeps pace with the decoder. 0: none.")
    adversarial_loss: str = option("hinge", "Form of the adversarial loss.", choices=ADVERSARIAL_LOSSES)
    adaptive_weight: bool = option(True, "Scale the adversarial gradient to the reconstruction gradient's size.")
    adaptive_weight_max: float = option(1e4, "Cap of that scale.")
    disc_start: int = option(0, "Step at which the discriminator starts to train.")
    disc_ramp_steps: int = option(0, "Steps over which the adversarial weight then grows from 0 to full.")
    disc_type: str = option("patchgan", "Discriminator (discriminators.py).", choices=DISCRIMINATORS)
    disc_channels: int = option(64, "PatchGAN, StyleGAN: channels of the first layer.")
    disc_layers: int = option(3, "PatchGAN: stride-2 layers; patches of 16, 34, 70 pixels for 1, 2, 3.")
    disc_backbone: str = option("facebook/dino-vits16", "DINO: frozen vision transformer, Hub id or folder.")
    diff_augment: list[str] = option([], "Augment what the discriminator sees, for small sets.", choices=AUGMENTATIONS)
    lecam_weight: float = option(0.0, "Weight of LeCAM, which holds real and fake logits together, for small sets.")
    lecam_decay: float = option(0.999, "Decay per step of LeCAM's moving averages of the logits.")
    r1_weight: float = option(0.0, "Weight γ of γ/2 E|∂D/∂x|², the discriminator's gradient penalty on real images.")
    r1_interval: int = option(16, "Steps between gradient penalties, each of which then weighs so many times more.")

    adversarial_gradient_at_z: float = option(
        1.0,
        "Share of the adversarial gradient that passes from the decoder to z and the encoder. 0: they never see it.",
    )

    # The latent space (regularizers.py)
    equivariance_share: float = option(0.0, "Share of the steps whose latents and target are transformed alike.")
    equivariance_transforms: list[str] = option(["scale", "rotate"], "By what.", choices=TRANSFORMS)
    latent_noise_std: float = option(0.0, "Standard deviation of noise added to the latents in training.")
    alignment_weight: float = option(0.0, "Weight of the latents' alignment with a frozen vision model's features.")
    alignment_model: str = option("facebook/dinov2-small", "That model: Hub id or folder.")

    # Codebook
    quantize_start: int = option(0, "Steps to train as a plain autoencoder before quantizing.")
    codebook_init: str | None = option(
        None,
        "Codebook at quantize_start: k-means of latents, or left as it is. Default: data, or none with init_from.",
        choices=("data", "none"),
    )
    dead_code_restart_steps: int = option(0, "Move codes unused for this many steps onto current latents. 0: never.")
    codebook_window: int = option(100, "Training steps over which perplexity and usage are counted.")
    stop_on_collapse: bool = option(
        False, "Stop, instead of only warning, when the codebook has collapsed.", role="watching"
    )
    entropy_anneal_factor: float = option(1.0, "The entropy loss starts with so many times its weight.")
    entropy_anneal_steps: int = option(0, "Steps over which that factor falls linearly to 1.")

    # Optimisation
    train_batch_size: int = option(16, "Images per process and forward pass.")
    gradient_accumulation_steps: int = option(1, "Forward passes per optimizer step.")
    max_train_steps: int | None = option(None, "Optimizer steps. Default: what num_train_epochs gives.")
    num_train_epochs: int = option(1, "Passes over the data, if max_train_steps is not given.")
    learning_rate: float = option(1e-4, "Learning rate of encoder, quantizer and decoder.")
    disc_learning_rate: float | None = option(None, "Learning rate of the discriminator. Default: learning_rate.")
    lr_scheduler: str = option("constant", "Schedule of learning_rate, a name that diffusers' get_scheduler knows.")
    lr_warmup_steps: int = option(0, "Steps of linear warm-up.")
    disc_lr_scheduler: str | None = option(None, "Schedule of disc_learning_rate. Default: lr_scheduler.")
    disc_lr_warmup_steps: int | None = option(None, "Its warm-up, from disc_start on. Default: lr_warmup_steps.")
    adam_beta1: float = option(0.5, "Adam's β1, both networks.")
    adam_beta2: float = option(0.9, "Adam's β2, both networks.")
    adam_weight_decay: float = option(0.0, "AdamW's weight decay, both networks.")
    adam_epsilon: float = option(1e-8, "Adam's ε, both networks.")
    use_8bit_adam: bool = option(False, "Keep the optimizers' memory in 8 bits (needs bitsandbytes).")
    max_grad_norm: float = option(1.0, "Clip the gradient of encoder, quantizer and decoder to this norm. 0: never.")
    disc_max_grad_norm: float | None = option(None, "Same for the discriminator. Default: max_grad_norm.")
    max_nonfinite_steps: int = option(
        20,
        "Stop after so many steps in a row with NaN or infinity in a loss or gradient. Each is skipped and counted.",
        role="watching",
    )
    use_ema: bool = option(False, "Keep a moving average of the weights: validated, saved and pushed in their place.")
    model_ema_decay: float = option(0.999, "Largest decay per step of that average; it starts lower.")
    mixed_precision: str = option("no", "Autocast.", choices=("no", "bf16", "fp16"))
    gradient_checkpointing: bool = option(
        False, "Recompute activations in the backward pass, to save memory.", role="watching"
    )
    torch_compile: bool = option(False, "Compile the blocks of encoder and decoder, the discriminator and LPIPS.")
    torch_compile_backend: str = option("inductor", "What to compile them with.")
    channels_last: bool = option(True, "Keep activations in channels_last memory format.")
    cpu_threads: int | None = option(
        None, "Threads per process on CPU. Default: the cores shared evenly.", role="place"
    )
    seed: int = option(0, "Seed of everything random.")

    # Watching and keeping
    logging_steps: int = option(10, "Steps between lines of log.jsonl and tracker entries.", role="watching")
    gradient_report_steps: int = option(
        250,
        "Steps between measurements of each loss's gradient at x̂, z and the encoder, as in gradients.png. 0: never.",
        role="watching",
    )
    validation_steps: int = option(500, "Steps between validations.", role="watching")
    validation_net: str = option("alex", "LPIPS network of the reported metric.", choices=tuple(NETWORKS))
    latent_statistics_images: int = option(
        512,
        "Training crops whose latents give scaling_factor and shift_factor at the end. 0: not measured.",
    )
    validation_pictures: int = option(4, "Validation images in reconstructions.png.", role="watching")
    checkpointing_steps: int = option(
        500, "Steps between checkpoints; there is always one at the end.", role="watching"
    )
    checkpoints_total_limit: int | None = option(2, "Keep only the latest so many checkpoints.", role="watching")
    push_to_hub: bool = option(False, "Push the run to the Hub at every checkpoint.", role="place")
    hub_model_id: str | None = option(None, "Repository to push to. Default: the name of output_dir.", role="place")
    hub_token: str | None = option(None, "Token to push with. Default: the one of `hf auth login`.", role="secret")
    hub_private_repo: bool | None = option(None, "Make a new repository private.", role="place")
    hub_license: str | None = option(
        None, "Licence of the weights for the model card, as the Hub names it.", role="place"
    )
    report_to: str | None = option(
        None, "Tracker, as Accelerate names it: tensorboard, wandb, trackio, all.", role="place"
    )

    def __post_init__(self):
        if self.codebook_init is None:
            self.codebook_init = "none" if self.init_from else "data"
        check_values(
            self,
            positive=(
                "resolution",
                "crops_per_image",
                "train_batch_size",
                "gradient_accumulation_steps",
                "num_train_epochs",
                "logging_steps",
                "validation_steps",
                "checkpointing_steps",
                "codebook_window",
                "perceptual_upscale",
                "disc_layers",
                "r1_interval",
                "max_nonfinite_steps",
                "shuffle_buffer_size",
                "shard_groups",
            ),
            not_negative=(
                "l1_weight",
                "l2_weight",
                "perceptual_weight",
                "adversarial_weight",
                "learning_rate",
                "disc_start",
                "disc_ramp_steps",
                "quantize_start",
                "dead_code_restart_steps",
                "lr_warmup_steps",
                "max_grad_norm",
                "latent_statistics_images",
                "lecam_weight",
                "r1_weight",
                "adversarial_gradient_at_z",
                "latent_noise_std",
                "alignment_weight",
                "gradient_report_steps",
            ),
        )
        for name in ("max_unreadable_share", "equivariance_share", "lecam_decay", "model_ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1].")
        if self.disc_type == "stylegan" and self.equivariance_share and "scale" in self.equivariance_transforms:
            raise ValueError(
                "disc_type='stylegan' judges images of one size: leave 'scale' out of equivariance_transforms, or take "
                "disc_type='patchgan'."
            )
        if self.decoder_only and self.init_from is None:
            raise ValueError("decoder_only=True needs init_from: a trained model whose encoder and codebook stay.")
        if self.checkpoints_total_limit is not None and self.checkpoints_total_limit < 1:
            raise ValueError(
                f"checkpoints_total_limit={self.checkpoints_total_limit} must be at least 1, or null for all of them."
            )
        if not (self.l1_weight or self.l2_weight or self.perceptual_weight):
            raise ValueError("l1_weight, l2_weight and perceptual_weight are all 0: nothing says what to reconstruct.")
        if self.max_train_steps is not None and self.max_train_steps < 1:
            raise ValueError(f"max_train_steps={self.max_train_steps} must be at least 1.")
        self._check_data()

    def _check_data(self):
        if not self.dataset_name:
            raise ValueError("dataset_name is empty: name a Hub dataset, a local folder, or package:NAME/FOLDER.")
        if self.dataset_weights and len(self.dataset_weights) != 1 + len(self.extra_datasets):
            raise ValueError(
                f"dataset_weights={self.dataset_weights} has {len(self.dataset_weights)} weights for "
                f"{1 + len(self.extra_datasets)} dataset(s), which are dataset_name and extra_datasets="
                f"{self.extra_datasets}: give one weight for each."
            )
        if self.dataloader_num_workers is not None and self.dataloader_num_workers < 0:
            raise ValueError(f"dataloader_num_workers={self.dataloader_num_workers} must not be negative.")
        if self.streaming and self.max_train_steps is None:
            raise ValueError("streaming needs max_train_steps: how many images a stream has is not known before.")
        if self.streaming and self.crops_per_image > 1:
            raise ValueError(
                f"crops_per_image={self.crops_per_image} needs streaming=False: a stream gives each image once a pass."
            )
        if self.shard_groups > 1 and not self.streaming:
            raise ValueError(f"shard_groups={self.shard_groups} needs streaming=True.")
