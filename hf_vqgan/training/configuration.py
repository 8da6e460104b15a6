"""What a training run can be told: sections that all trainers share, and those of the tokenizer's."""

from dataclasses import dataclass

from accelerate.utils import LoggerType
from diffusers.optimization import SchedulerType

from ..files.options import MAX_SEED, check_values, option
from ..losses.discriminators import AUGMENTATIONS, DISCRIMINATORS
from ..losses.image_losses import ADVERSARIAL_LOSSES
from ..losses.lpips_weights import NETWORKS
from ..losses.regularizers import TRANSFORMS

# Schedules and trackers by name. A piecewise schedule would need rules that no flag can give.
LR_SCHEDULERS = tuple(kind.value for kind in SchedulerType if kind is not SchedulerType.PIECEWISE_CONSTANT)
TRACKERS = tuple(kind.value for kind in LoggerType)


# ---------------------------------------------------------------------------------------------------------------------
# Sections that all trainers share. A configuration inherits the sections it has, so it is one of each of them, and a
# function that needs one section asks for that.


@dataclass
class DatasetOptions:
    """Images: where they are, and how they become square crops."""

    dataset_name: str = option(
        "",
        "Hub dataset, local path that load_dataset reads, or package:NAME/FOLDER.",
        describes_dataset=True,
        nonempty=True,
    )
    dataset_config_name: str | None = option(None, "Configuration of the dataset.", describes_dataset=True)
    dataset_revision: str | None = option(None, "Branch, tag or commit of a Hub dataset.", describes_dataset=True)
    train_split: str = option("train", "Split to train on.", describes_dataset=True)
    image_column: str | None = option(
        None, "Column with the images. Default: the only image column.", describes_dataset=True
    )
    max_train_samples: int | None = option(
        None, "Use only the first so many training images of each dataset.", at_least=1
    )
    cache_dir: str | None = option(None, "Where `datasets` keeps what it downloads.", role="place")
    resolution: int = option(256, "Side in pixels of the square crops to train on.", at_least=1)
    resize: int | None = option(
        None,
        "Shorter side before cropping. Default: resolution. 0: keep the image's size.",
        describes_dataset=True,
        at_least=0,
    )
    center_crop: bool = option(False, "Crop the centre instead of a random place.", describes_dataset=True)
    random_flip: bool = option(True, "Mirror half of the crops.", describes_dataset=True)
    max_unreadable_share: float = option(
        0.2,
        "Stop when a larger share of the training images cannot be decoded.",
        at_least=0,
        at_most=1,
        role="watching",
    )
    dataloader_num_workers: int | None = option(
        None,
        "Processes that decode images, per training process. Default: its share of the cores but one, at most 8.",
        at_least=0,
        role="place",
    )


@dataclass
class OptimizationOptions:
    """Optimization: batches, steps, Adam and its schedule."""

    train_batch_size: int = option(16, "Images per process and forward pass.", at_least=1)
    gradient_accumulation_steps: int = option(1, "Forward passes per optimizer step.", at_least=1)
    max_train_steps: int | None = option(None, "Optimizer steps. Default: what num_train_epochs gives.", at_least=1)
    num_train_epochs: int = option(1, "Passes over the data, if max_train_steps is not given.", at_least=1)
    learning_rate: float = option(1e-4, "Learning rate of encoder, quantizer and decoder.", at_least=0)
    lr_scheduler: str = option(
        "constant", "Schedule of learning_rate, a name that diffusers' get_scheduler knows.", choices=LR_SCHEDULERS
    )
    lr_warmup_steps: int = option(0, "Steps of linear warm-up.", at_least=0)
    adam_beta1: float = option(0.5, "Adam's β1, both networks.", at_least=0, below=1)
    adam_beta2: float = option(0.9, "Adam's β2, both networks.", at_least=0, below=1)
    adam_weight_decay: float = option(0.0, "AdamW's weight decay, both networks.", at_least=0)
    adam_epsilon: float = option(1e-8, "Adam's ε, both networks.", above=0)
    use_8bit_adam: bool = option(False, "Keep the optimizers' memory in 8 bits (needs bitsandbytes).")
    max_grad_norm: float = option(
        1.0, "Clip the gradient of encoder, quantizer and decoder to this norm. 0: never.", at_least=0
    )
    max_nonfinite_steps: int = option(
        20,
        "Stop after so many steps in a row with NaN or infinity in a loss or gradient. Each is skipped and counted.",
        at_least=1,
        role="watching",
    )
    mixed_precision: str = option("no", "Autocast.", choices=("no", "bf16", "fp16"))
    gradient_checkpointing: bool = option(
        False, "Recompute activations in the backward pass, to save memory.", role="watching"
    )
    cpu_threads: int | None = option(
        None, "Threads per process on CPU. Default: the cores shared evenly.", at_least=1, role="place"
    )
    seed: int = option(0, "Seed of everything random.", at_least=0, at_most=MAX_SEED)


@dataclass
class RunOptions:
    """The run's folder, log and checkpoints."""

    output_dir: str = option(
        "runs/vqgan", "Folder of the run: model, pictures, metrics and checkpoints.", nonempty=True, role="place"
    )
    overwrite_output_dir: bool = option(
        False, "Delete a run with other settings from output_dir. The same command again still resumes.", role="place"
    )
    resume_from_checkpoint: str | None = option(
        None,
        "`latest` (none yet: a new run), or a checkpoint folder. The same command run again resumes without it, too.",
        role="place",
    )
    logging_steps: int = option(
        10, "Steps between lines of log.jsonl and tracker entries.", at_least=1, role="watching"
    )
    checkpointing_steps: int = option(
        500, "Steps between checkpoints; there is always one at the end.", at_least=1, role="watching"
    )
    checkpoints_total_limit: int | None = option(
        2, "Keep only the latest so many checkpoints.", at_least=1, role="watching"
    )
    report_to: str | None = option(
        None, "Tracker, as Accelerate names it: tensorboard, wandb, trackio, all.", choices=TRACKERS, role="place"
    )


@dataclass
class HubOptions:
    """Sharing on the Hub."""

    push_to_hub: bool = option(False, "Push the run to the Hub at every checkpoint.", role="place")
    hub_model_id: str | None = option(None, "Repository to push to. Default: the name of output_dir.", role="place")
    hub_token: str | None = option(None, "Token to push with. Default: the one of `hf auth login`.", role="secret")
    hub_private_repo: bool | None = option(None, "Make a new repository private.", role="place")
    hub_license: str | None = option(
        None, "Licence of the weights for the model card, as the Hub names it.", role="place"
    )


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer's


@dataclass
class TokenizerDataOptions:
    """More about images: mixtures, streams, validation."""

    extra_datasets: list[str] = option(
        [], "More datasets to train on, named as dataset_name is.", describes_dataset=True
    )
    dataset_weights: list[float] = option(
        [],
        "Share of the samples from dataset_name and from each of extra_datasets. Default: every image once.",
        describes_dataset=True,
        above=0,
    )
    validation_split: str | None = option(
        None, "Default: `validation`, else `test`, else images held out of train.", describes_dataset=True
    )
    train_files: list[str] = option(
        [], "Patterns of the training files inside the dataset. Default: all.", describes_dataset=True
    )
    validation_files: list[str] = option(
        [], "Patterns of the validation files inside the dataset.", describes_dataset=True
    )
    max_validation_samples: int | None = option(64, "Use only the first so many validation images.", at_least=1)
    streaming: bool = option(False, "Read the training images as a stream, without downloading or indexing them first.")
    shuffle_buffer_size: int = option(1000, "Images of each stream among which the next one is drawn.", at_least=1)
    shard_groups: int = option(
        1, "Deal a stream's shards out to so many groups, so that processes read only their own.", at_least=1
    )
    crops_per_image: int = option(1, "Crops that one image yields per epoch.", describes_dataset=True, at_least=1)
    validate_whole_images: bool = option(
        False, "Validate on whole images instead of their central square.", describes_dataset=True
    )


@dataclass
class ReconstructionOptions:
    """Reconstruction losses: pixels and features (losses/image_losses.py)."""

    l1_weight: float = option(1.0, "Weight of |x̂ - x|: counts pixels.", at_least=0)
    l2_weight: float = option(0.0, "Weight of (x̂ - x)².", at_least=0)
    perceptual_weight: float = option(1.0, "Weight of LPIPS: compares features.", at_least=0)
    perceptual_net: str = option("vgg", "LPIPS network for training.", choices=tuple(NETWORKS))
    perceptual_weights_path: str | None = option(None, "File with the LPIPS network's weights. Default: fetched.")
    perceptual_upscale: int = option(
        1, "Enlarge crops this many times before LPIPS; 2 helps crops below 64 pixels.", at_least=1
    )


@dataclass
class AdversarialOptions:
    """Adversarial loss and discriminator (losses/discriminators.py)."""

    adversarial_weight: float = option(
        0.8, "Weight of the adversarial loss: keeps pace with the decoder. 0: none.", at_least=0
    )
    adversarial_loss: str = option("hinge", "Form of the adversarial loss.", choices=ADVERSARIAL_LOSSES)
    adaptive_weight: bool = option(True, "Scale the adversarial gradient to the reconstruction gradient's size.")
    adaptive_weight_max: float = option(1e4, "Cap of that scale.", above=0)
    adversarial_gradient_at_z: float = option(
        1.0,
        "Share of the adversarial gradient that passes from the decoder to z and the encoder. 0: they never see it.",
        at_least=0,
    )
    disc_start: int = option(0, "Step at which the discriminator starts to train.", at_least=0)
    disc_ramp_steps: int = option(0, "Steps over which the adversarial weight then grows from 0 to full.", at_least=0)
    disc_type: str = option("patchgan", "Discriminator (losses/discriminators.py).", choices=DISCRIMINATORS)
    disc_channels: int = option(64, "PatchGAN, StyleGAN: channels of the first layer.", at_least=1)
    disc_layers: int = option(3, "PatchGAN: stride-2 layers; patches of 16, 34, 70 pixels for 1, 2, 3.", at_least=1)
    disc_backbone: str = option("facebook/dino-vits16", "DINO: frozen vision transformer, Hub id or folder.")
    disc_learning_rate: float | None = option(
        None, "Learning rate of the discriminator. Default: learning_rate.", at_least=0
    )
    disc_lr_scheduler: str | None = option(
        None, "Schedule of disc_learning_rate. Default: lr_scheduler.", choices=LR_SCHEDULERS
    )
    disc_lr_warmup_steps: int | None = option(
        None, "Its warm-up, from disc_start on. Default: lr_warmup_steps.", at_least=0
    )
    disc_max_grad_norm: float | None = option(None, "Same for the discriminator. Default: max_grad_norm.", at_least=0)
    diff_augment: list[str] = option([], "Augment what the discriminator sees, for small sets.", choices=AUGMENTATIONS)
    lecam_weight: float = option(
        0.0, "Weight of LeCAM, which holds real and fake logits together, for small sets.", at_least=0
    )
    lecam_decay: float = option(
        0.999, "Decay per step of LeCAM's moving averages of the logits.", at_least=0, at_most=1
    )
    r1_weight: float = option(
        0.0, "Weight γ of γ/2 E|∂D/∂x|², the discriminator's gradient penalty on real images.", at_least=0
    )
    r1_interval: int = option(
        16, "Steps between gradient penalties, each of which then weighs so many times more.", at_least=1
    )


@dataclass
class LatentOptions:
    """Regularizers of the latent space (losses/regularizers.py)."""

    equivariance_share: float = option(
        0.0, "Share of the steps whose latents and target are transformed alike.", at_least=0, at_most=1
    )
    equivariance_transforms: list[str] = option(["scale", "rotate"], "By what.", choices=TRANSFORMS)
    latent_noise_std: float = option(0.0, "Standard deviation of noise added to the latents in training.", at_least=0)
    alignment_weight: float = option(
        0.0, "Weight of the latents' alignment with a frozen vision model's features.", at_least=0
    )
    alignment_model: str = option("facebook/dinov2-small", "That model: Hub id or folder.")


@dataclass
class CodebookOptions:
    """Codebook: its start, its upkeep, its annealing."""

    quantize_start: int = option(0, "Steps to train as a plain autoencoder before quantizing.", at_least=0)
    codebook_init: str | None = option(
        None,
        "Codebook at quantize_start: k-means of latents, or left as it is. Default: data, or none with init_from.",
        choices=("data", "none"),
    )
    dead_code_restart_steps: int = option(
        0, "Move codes unused for this many steps onto current latents. 0: never.", at_least=0
    )
    codebook_window: int = option(100, "Training steps over which perplexity and usage are counted.", at_least=1)
    stop_on_collapse: bool = option(
        False, "Stop, instead of only warning, when the codebook has collapsed.", role="watching"
    )
    entropy_anneal_factor: float = option(1.0, "The entropy loss starts with so many times its weight.", at_least=0)
    entropy_anneal_steps: int = option(0, "Steps over which that factor falls linearly to 1.", at_least=0)


@dataclass
class ReportOptions:
    """Validation and reports."""

    validation_steps: int = option(500, "Steps between validations.", at_least=1, role="watching")
    validation_net: str = option("alex", "LPIPS network of the reported metric.", choices=tuple(NETWORKS))
    validation_pictures: int = option(4, "Validation images in reconstructions.png.", at_least=1, role="watching")
    gradient_report_steps: int = option(
        250,
        "Steps between measurements of each loss's gradient at x̂, z and the encoder, as in gradients.png. 0: never.",
        at_least=0,
        role="watching",
    )
    latent_statistics_images: int = option(
        512,
        "Training crops whose latents give scaling_factor and shift_factor at the end. 0: not measured.",
        at_least=0,
    )


@dataclass
class NetworkOptions:
    """Networks: their start, averages, and speed."""

    init_from: str | None = option(
        None, "Start from a trained model: Hub id or folder. Model flags then override its config."
    )
    decoder_only: bool = option(False, "With init_from: train the decoder alone, so that all codes keep their meaning.")
    use_ema: bool = option(False, "Keep a moving average of the weights: validated, saved and pushed in their place.")
    model_ema_decay: float = option(
        0.999, "Largest decay per step of that average; it starts lower.", at_least=0, at_most=1
    )
    torch_compile: bool = option(False, "Compile the blocks of encoder and decoder, the discriminator and LPIPS.")
    torch_compile_backend: str = option("inductor", "What to compile them with.")
    channels_last: bool = option(True, "Keep activations in channels_last memory format.")


# Python collects the fields of bases from the last to the first: read these from below.
@dataclass
class VQGANTrainingConfig(
    HubOptions,
    RunOptions,
    ReportOptions,
    NetworkOptions,
    OptimizationOptions,
    CodebookOptions,
    LatentOptions,
    AdversarialOptions,
    ReconstructionOptions,
    TokenizerDataOptions,
    DatasetOptions,
):
    """A tokenizer's training run, but for the model's architecture. Every field is a flag of `hf-vqgan train`."""

    def __post_init__(self):
        check_values(self)
        if self.codebook_init is None:
            self.codebook_init = "none" if self.init_from else "data"
        if self.disc_type == "stylegan" and self.equivariance_share and "scale" in self.equivariance_transforms:
            raise ValueError(
                "disc_type='stylegan' judges images of one size: leave 'scale' out of equivariance_transforms, or take "
                "disc_type='patchgan'."
            )
        if self.equivariance_share and not self.equivariance_transforms:
            raise ValueError(
                f"equivariance_transforms is empty: equivariance_share={self.equivariance_share} of the steps need "
                f"one or more of {', '.join(TRANSFORMS)}."
            )
        if self.decoder_only and self.init_from is None:
            raise ValueError("decoder_only=True needs init_from: a trained model whose encoder and codebook stay.")
        if self.max_train_steps is not None and self.quantize_start >= self.max_train_steps:
            raise ValueError(
                f"quantize_start={self.quantize_start} is never reached within max_train_steps={self.max_train_steps}: "
                "this would train an autoencoder without codes. Lower --quantize_start (here, say, to "
                f"{self.max_train_steps // 8}), or raise --max_train_steps (or --num_train_epochs)."
            )
        if not (self.l1_weight or self.l2_weight or self.perceptual_weight):
            raise ValueError("l1_weight, l2_weight and perceptual_weight are all 0: nothing says what to reconstruct.")
        self._check_data()

    def _check_data(self):
        if self.dataset_weights and len(self.dataset_weights) != 1 + len(self.extra_datasets):
            raise ValueError(
                f"dataset_weights={self.dataset_weights} has {len(self.dataset_weights)} weights for "
                f"{1 + len(self.extra_datasets)} dataset(s), which are dataset_name and extra_datasets="
                f"{self.extra_datasets}: give one weight for each."
            )
        if self.streaming and self.max_train_steps is None:
            raise ValueError("streaming needs max_train_steps: how many images a stream has is not known before.")
        if self.streaming and self.crops_per_image > 1:
            raise ValueError(
                f"crops_per_image={self.crops_per_image} needs streaming=False: a stream gives each image once a pass."
            )
        if self.shard_groups > 1 and not self.streaming:
            raise ValueError(f"shard_groups={self.shard_groups} needs streaming=True.")

    def never_reached(self) -> list[str]:
        """Settings that a run of `max_train_steps` is too short for, or that others undo, and what comes of each."""
        steps, found = self.max_train_steps, []

        def reached(start: int, length: int) -> str:
            return f"{max(0, steps - start) / length:.0%}"

        disc_start, ramp = self.disc_start, self.disc_ramp_steps
        if self.adversarial_weight and disc_start >= steps:
            found.append(f"disc_start={disc_start}: no discriminator, no adversarial loss")
        elif self.adversarial_weight and disc_start + ramp > steps:
            found.append(
                f"disc_ramp_steps={ramp}: the adversarial weight ends at {reached(disc_start, ramp)} of itself"
            )
        if self.lr_warmup_steps and self.lr_scheduler == "constant":
            found.append(f"lr_warmup_steps={self.lr_warmup_steps}: for --lr_scheduler constant_with_warmup and others")
        elif self.lr_warmup_steps > steps:
            found.append(
                f"lr_warmup_steps={self.lr_warmup_steps}: learning_rate ends at {reached(0, self.lr_warmup_steps)}"
            )
        quantizing = steps - self.quantize_start
        if self.dead_code_restart_steps > quantizing:
            found.append(f"dead_code_restart_steps={self.dead_code_restart_steps}: no code is unused for so long")
        if self.entropy_anneal_factor != 1 and self.entropy_anneal_steps > quantizing:
            found.append(f"entropy_anneal_steps={self.entropy_anneal_steps}: the factor does not come down to 1")
        if self.stop_on_collapse and self.codebook_window > quantizing:
            found.append(f"stop_on_collapse: codebook_window={self.codebook_window} never fills")
        return found
