"""What each loss does to the latent space: runs that differ in one respect, over several seeds, measured alike.

A run's latents are one draw of many: seeds alone move every figure. So each variant is compared with the one that it
differs from in a single respect, seed by seed (same data order, same start), and what is reported is the mean of the
differences with its confidence interval over seeds.
"""

import contextlib
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from matplotlib.figure import Figure
from scipy.stats import t as student_t
from torch import Tensor

from hf_vqgan.configuration_vqgan import VQGANConfig
from hf_vqgan.evaluation.latent_analysis import GROUPS, LatentAnalysisConfig, NotApplicable, Subject, prepare
from hf_vqgan.files.documents import write_text
from hf_vqgan.files.options import MAX_SEED, check_values, option
from hf_vqgan.losses.image_losses import LPIPS
from hf_vqgan.losses.lpips_weights import NETWORKS
from hf_vqgan.measurement.latent_pictures import draw_strips
from hf_vqgan.measurement.latent_space import high_frequency_share, slerp
from hf_vqgan.measurement.pictures import draw_comparison
from hf_vqgan.training.configuration import VQGANTrainingConfig
from hf_vqgan.training.tokenizer import train

# ---------------------------------------------------------------------------------------------------------------------
# What is compared


@dataclass(frozen=True)
class Variant:
    """
    Args:
        reference (`str`, *optional*): The variant that this one differs from in one respect.
        training (`dict`): Fields of the training configuration that are not the study's.
        model (`dict`): Fields of the model's.
    """

    reference: str | None
    training: dict = field(default_factory=dict)
    model: dict = field(default_factory=dict)


WITHOUT_GAN = {"adversarial_weight": 0.0}
GAN = "L1 + LPIPS + GAN"
VARIANTS = {
    "L1": Variant(None, WITHOUT_GAN | {"perceptual_weight": 0.0}),
    "L1 + LPIPS": Variant("L1", WITHOUT_GAN),
    GAN: Variant("L1 + LPIPS"),
    "GAN cut at z": Variant(GAN, {"adversarial_gradient_at_z": 0.0}),
    "scale + rotate": Variant(GAN, {"equivariance_share": 0.5, "equivariance_transforms": ["scale", "rotate"]}),
    "scale": Variant(GAN, {"equivariance_share": 0.5, "equivariance_transforms": ["scale"]}),
    "latent noise": Variant(GAN, {"latent_noise_std": 0.1}),
    "token perturbation": Variant(GAN, {}, {"perturbation_share": 0.1}),
}

# The figures of the tables: title, which way is better. Those up to the perplexity are of the run's metrics.json.
MEASURES = {
    "psnr": ("PSNR (dB)", "higher"),
    "ssim": ("SSIM", "higher"),
    "lpips": ("LPIPS, network of the loss", "lower"),
    "validation_perplexity": ("perplexity of the codes", "higher"),
    "other_lpips": ("LPIPS, another network", "lower"),
    "detail": ("detail kept", "higher"),
    "rkid": ("rKID", "lower"),
    "ikid": ("iKID: half-way between neighbours", "lower"),
    "holes": ("holes: iKID - rKID", "lower"),
    "pkid": ("pKID: 10 % of tokens exchanged", "lower"),
    "token_robustness": ("change when tokens are exchanged", "lower"),
    "perceptual_path_length": ("perceptual path length", "lower"),
    "path_straightness": ("straightness of the path", "higher"),
    "path_straightness_quantized": ("straightness, quantized", "higher"),
    "lipschitz": ("Lipschitz constant", "lower"),
    "index_stability_noise": ("codes that stay under ±1/255", "higher"),
    "index_stability_pixel_shift": ("codes that stay under a 1-pixel shift", "higher"),
    "code_neighbour_consistency": ("near codes look alike", "higher"),
    "equivariance_scale": ("equivariance error, half size", "lower"),
    "equivariance_rotation": ("equivariance error, 90°", "lower"),
    "equivariance_scale_reconstruction": ("LPIPS of scaled latents", "lower"),
    "latent_high_frequency_share": ("high frequencies in the latents", "lower"),
    "linear_probe": ("linear probe", "higher"),
    "effective_dimension": ("effective dimension", "higher"),
    "diffusion_loss": ("loss of a small diffusion model", "lower"),
    "gkid": ("KID of its samples", "lower"),
}


@dataclass
class LossStudyConfig:
    """A study of the losses. Every field is a flag of `study_losses.py`."""

    dataset_name: str = option(
        "", "Hub dataset, local path that load_dataset reads, or package:NAME/FOLDER.", nonempty=True
    )
    output_dir: str = option("runs/losses", "Folder of the study; every run is a folder in it.", nonempty=True)
    variants: list[str] = option(
        list(VARIANTS), "Run only these, and what they are compared with.", choices=tuple(VARIANTS), nonempty=True
    )
    seeds: list[int] = option([0, 1, 2], "Seeds of every variant.", at_least=0, at_most=MAX_SEED, nonempty=True)

    resolution: int = option(32, "Side of the images, in training and measurement.", at_least=1)
    block_out_channels: list[int] = option(
        [8, 16, 32], "Channels of the levels, all but the first after a halving.", at_least=1, nonempty=True
    )
    latent_channels: int = option(8, "Dimension D of latents and codes.", at_least=1)
    num_vq_embeddings: int = option(256, "Number of codes K.", at_least=1)
    max_train_steps: int = option(200, "Steps of every run; the discriminator starts after a third.", at_least=1)
    train_batch_size: int = option(8, "Images per step.", at_least=1)
    learning_rate: float = option(1e-3, "Learning rate of the model.", at_least=0)
    # As fast as the model, with the weight 0.8, this small discriminator swings from "all real" to "all false".
    disc_learning_rate: float = option(2e-4, "Learning rate of the discriminator.", at_least=0)
    adversarial_weight: float = option(0.4, "Weight of the adversarial loss, where there is one.", at_least=0)
    perceptual_weight: float = option(0.3, "Weight of LPIPS, where there is one.", at_least=0)
    perceptual_net: str = option("alex", "LPIPS network of the loss and of the measures.", choices=tuple(NETWORKS))
    perceptual_weights_path: str | None = option(None, "Its weights. Default: fetched.")
    other_net: str = option(
        "vgg", "LPIPS network that no run is trained on, for one of the measures.", choices=tuple(NETWORKS)
    )
    other_weights_path: str | None = option(None, "Its weights. Default: fetched.")

    max_samples: int = option(48, "Images to measure on, of the validation or test split.", at_least=8)
    measures: list[str] = option(
        ["smoothness", "lipschitz", "holes", "robustness", "equivariance", "spectrum", "dimension"],
        "What to measure of the latent space.",
        tuple(GROUPS),
        nonempty=True,
    )
    diffusion_steps: int = option(
        500, "Training steps of the measure `diffusability`, if it is among them.", at_least=1
    )
    cpu_threads: int = option(1, "Threads per run on CPU.", at_least=1)

    def __post_init__(self):
        check_values(self)
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds={self.seeds} must be different numbers.")

    def chosen(self) -> dict[str, Variant]:
        """The chosen variants and those that they are compared with."""
        names = {*self.variants, *(VARIANTS[name].reference for name in self.variants)}
        return {name: variant for name, variant in VARIANTS.items() if name in names}


# ---------------------------------------------------------------------------------------------------------------------
# The runs


def run_folder(config: LossStudyConfig, name: str, seed: int) -> Path:
    return Path(config.output_dir) / f"{name.lower().replace(' + ', '-').replace(' ', '_')}-seed{seed}"


def model_config(config: LossStudyConfig, variant: Variant) -> VQGANConfig:
    levels = len(config.block_out_channels)
    fields = dict(
        block_out_channels=tuple(config.block_out_channels),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        mid_block_add_attention=False,
        norm_num_groups=8,
        latent_channels=config.latent_channels,
        vq_embed_dim=config.latent_channels,
        num_vq_embeddings=config.num_vq_embeddings,
        quantizer="vq_ema",
        sample_size=config.resolution,
    )
    return VQGANConfig(**fields | variant.model)


def training_config(config: LossStudyConfig, name: str, variant: Variant, seed: int) -> VQGANTrainingConfig:
    steps = config.max_train_steps
    fields = dict(
        dataset_name=config.dataset_name,
        output_dir=str(run_folder(config, name, seed)),
        resolution=config.resolution,
        max_validation_samples=config.max_samples,
        perceptual_weight=config.perceptual_weight,
        perceptual_net=config.perceptual_net,
        perceptual_weights_path=config.perceptual_weights_path,
        perceptual_upscale=2,
        validation_net=config.perceptual_net,
        disc_start=steps // 3,
        disc_channels=32,
        disc_layers=1,
        quantize_start=steps // 10,
        dead_code_restart_steps=20,
        train_batch_size=config.train_batch_size,
        max_train_steps=steps,
        learning_rate=config.learning_rate,
        disc_learning_rate=config.disc_learning_rate,
        adversarial_weight=config.adversarial_weight,
        lr_warmup_steps=min(20, steps),
        lr_scheduler="constant_with_warmup",
        dataloader_num_workers=0,
        cpu_threads=config.cpu_threads,
        seed=seed,
        latent_statistics_images=0,
        gradient_report_steps=max(1, steps // 10),
        validation_steps=steps,
        checkpointing_steps=steps,
    )
    return VQGANTrainingConfig(**fields | variant.training)


def run(config: LossStudyConfig, name: str, variant: Variant, seed: int) -> dict[str, float]:
    """
    Train and measure one variant with one seed, or read what an earlier call has left.

    Returns:
        The figures of `MEASURES` that there are.
    """
    folder = run_folder(config, name, seed)
    figures = train(training_config(config, name, variant, seed), model_config(config, variant))
    done = folder / "measured.json"
    settings = asdict(analysis_config(config)) | {"dataset": config.dataset_name, "other_net": config.other_net}
    earlier = json.loads(done.read_text()) if done.is_file() else None
    if earlier is None or earlier["settings"] != settings:
        earlier = {"settings": settings, "figures": measure(config, folder)}
        write_text(done, json.dumps(earlier, indent=1) + "\n")
    figures = figures | earlier["figures"]
    if "ikid" in figures:
        figures["holes"] = figures["ikid"] - figures["rkid"]
    return {key: figures[key] for key in MEASURES if key in figures}


def analysis_config(config: LossStudyConfig) -> LatentAnalysisConfig:
    return LatentAnalysisConfig(
        measures=config.measures,
        max_samples=config.max_samples,
        path_steps=8,
        diffusion_steps=config.diffusion_steps,
        perceptual_net=config.perceptual_net,
        perceptual_weights_path=config.perceptual_weights_path,
    )


@torch.no_grad()
def measure(config: LossStudyConfig, folder: Path) -> dict[str, float]:
    """The latent space of the model in `folder`; `detail` and `other_lpips` of its reconstructions."""
    torch.set_num_threads(config.cpu_threads)
    subject, _ = prepare(str(folder), config.dataset_name, analysis_config(config))
    figures: dict[str, float] = {}
    for group in config.measures:
        with contextlib.suppress(NotApplicable):
            figures |= {key: measure.value for key, measure in GROUPS[group](subject).items()}
    rebuilt = subject.batched(subject.decode_quantized, subject.latents)
    other = LPIPS(config.other_net, config.other_weights_path).to(rebuilt.device)
    figures["other_lpips"] = float(subject.batched(other, rebuilt, subject.pixels).mean())
    figures["detail"] = detail_kept(rebuilt, subject.pixels)
    return figures


def detail_kept(rebuilt: Tensor, originals: Tensor) -> float:
    """
    Energy of the reconstructions `(N, 3, H, W)` above half the Nyquist frequency, over that of the originals. Blur
    takes it below 1; invented texture counts like true one.
    """

    def energy(images: Tensor) -> Tensor:
        centred = images - images.mean(dim=(2, 3), keepdim=True)
        return (high_frequency_share(images) * centred.square().sum(dim=(1, 2, 3))).sum()

    return float(energy(rebuilt) / energy(originals))


def run_study(config: LossStudyConfig) -> dict:
    """
    All runs, then study.json, study.md and pictures in `config.output_dir`. What is complete is not run again, and a
    study that is interrupted has every variant for its first seeds.

    Returns:
        What study.json holds: `settings`; `figures`, variant -> measure -> one value per seed; `effects`, variant ->
        measure -> [`Effect`] as a dict; `gradients_at_z`, variant -> loss -> what `gradients_at_z` gives.
    """
    chosen, folder = config.chosen(), Path(config.output_dir)
    figures: dict[str, dict[str, list[float]]] = {name: {} for name in chosen}
    for seed in config.seeds:
        for name, variant in chosen.items():
            print(f"--- {name}, seed {seed}", flush=True)
            for key, value in run(config, name, variant, seed).items():
                figures[name].setdefault(key, []).append(value)
    effects = {
        name: {
            key: asdict(paired_effect(values, figures[variant.reference][key])) for key, values in figures[name].items()
        }
        for name, variant in chosen.items()
        if variant.reference in chosen
    }
    logs = {name: [gradient_rows(run_folder(config, name, seed)) for seed in config.seeds] for name in chosen}
    gradients = {name: gradients_at_z(seeds, config.max_train_steps // 3) for name, seeds in logs.items()}
    study = {"settings": asdict(config), "figures": figures, "effects": effects, "gradients_at_z": gradients}
    write_text(folder / "study.json", json.dumps(study, indent=1) + "\n")
    write_text(folder / "study.md", describe(study))
    draw(config, list(chosen))
    figure = draw_gradients_at_z(logs)
    figure.savefig(folder / ".gradients.png", dpi=80)
    (folder / ".gradients.png").replace(folder / "gradients.png")
    return study


# ---------------------------------------------------------------------------------------------------------------------
# What is noise


@dataclass(frozen=True)
class Effect:
    """
    Args:
        mean (`float`): Mean over seeds of variant - reference.
        low, high (`float`, *optional*): Its 95 % confidence interval; `None` for a single seed, which has none.
    """

    mean: float
    low: float | None
    high: float | None

    @property
    def beyond_noise(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def paired_effect(values: Sequence[float], reference: Sequence[float]) -> Effect:
    r"""
    Student's interval for the mean of paired differences d_i = values_i - reference_i over n seeds,

        mean(d) ± t_{0.975, n-1} sd(d) / √n,

    which takes the differences for normal. t is 12.7, 4.3, 3.2, 2.8 for 2, 3, 4, 5 seeds.
    """
    differences = [a - b for a, b in zip(values, reference, strict=True)]
    mean, count = statistics.fmean(differences), len(differences)
    if count < 2:
        return Effect(mean, None, None)
    margin = float(student_t.ppf(0.975, count - 1)) * statistics.stdev(differences) / math.sqrt(count)
    return Effect(mean, mean - margin, mean + margin)


# ---------------------------------------------------------------------------------------------------------------------
# What arrives at z

TERMS = ("l1", "perceptual", "adversarial", "commitment")


def gradient_rows(folder: Path) -> list[dict[str, float]]:
    """The rows of a run's log.jsonl with gradients."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if any(key.startswith("gradient_z_") for key in row)]


def gradients_at_z(seeds: list[list[dict[str, float]]], start: int) -> dict[str, dict[str, float]]:
    """
    For each loss that reaches z, means over seeds and over the reports after step `start`: `share`, its norm over the
    sum of all norms, and `cosine` with the sum of all gradients.
    """
    rows = [row for log in seeds for row in log if row["step"] > start]
    present = [term for term in TERMS if rows and all(f"gradient_z_{term}" in row for row in rows)]
    totals = [sum(row[f"gradient_z_{term}"] for term in present) for row in rows]
    return {
        term: {
            "share": statistics.fmean(
                row[f"gradient_z_{term}"] / total for row, total in zip(rows, totals, strict=True)
            ),
            "cosine": statistics.fmean(row[f"cosine_z_{term}"] for row in rows),
        }
        for term in present
    }


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def describe(study: dict) -> str:
    """study.md: the figures, the effects, in bold where they exceed the noise, and the gradients at z."""
    return "\n".join([*figure_lines(study), "", *effect_lines(study), "", *gradient_lines(study)]) + "\n"


def shared_measures(study: dict) -> list[str]:
    return [key for key in MEASURES if all(key in table for table in study["figures"].values())]


def heading(first: str, columns: Iterable[str]) -> list[str]:
    names = [first, *columns]
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]


def figure_lines(study: dict) -> list[str]:
    figures, seeds = study["figures"], study["settings"]["seeds"]
    lines = [f"Mean ± standard deviation over {len(seeds)} seed(s); ↑ ↓: which way is better.", ""]
    lines += heading("measure", figures)
    for key in shared_measures(study):
        lines.append(f"| {title(key)} | {' | '.join(spread(table[key]) for table in figures.values())} |")
    return lines


def effect_lines(study: dict) -> list[str]:
    keys = shared_measures(study)
    effects = {name: [Effect(**table[key]) for key in keys] for name, table in study["effects"].items()}
    lines = [
        "Difference from the variant in brackets, paired by seed: mean [95 % Student interval]. **Bold**: the interval "
        "leaves out 0; ✓ the better way, ✗ the worse.",
        "",
        *heading("measure", (f"{name} [{VARIANTS[name].reference}]" for name in effects)),
    ]
    for number, key in enumerate(keys):
        cells = [effect_cell(row[number], MEASURES[key][1]) for row in effects.values()]
        lines.append(f"| {title(key)} | {' | '.join(cells)} |")
    comparisons = len(keys) * len(effects)
    bold = sum(effect.beyond_noise for row in effects.values() for effect in row)
    by_chance = f"chance alone would make about {0.05 * comparisons:.0f} so"
    return [*lines, "", f"{bold} of {comparisons} differences are bold; {by_chance}."]


def gradient_lines(study: dict) -> list[str]:
    tables = study["gradients_at_z"]
    lines = [
        "Gradients at z after the discriminator's start, mean over reports and seeds: share of the sum of all norms "
        "(cosine with the sum of all gradients).",
        "",
        *heading("loss", tables),
    ]
    for term in TERMS:
        entries = [table.get(term) for table in tables.values()]
        cells = [f"{entry['share']:.0%} ({entry['cosine']:+.2f})" if entry else "-" for entry in entries]
        lines.append(f"| {term} | {' | '.join(cells)} |")
    return lines


def title(key: str) -> str:
    name, better = MEASURES[key]
    return f"{name} {'↑' if better == 'higher' else '↓'}"


def spread(values: list[float]) -> str:
    """Mean ± standard deviation, both to the latter's second digit; of one value, that."""
    mean, deviation = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
    if not deviation:
        return f"{mean:.3g}"
    digits = max(0, 1 - math.floor(math.log10(deviation)))
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def effect_cell(effect: Effect, better: str) -> str:
    if effect.low is None or effect.high is None:
        return f"{effect.mean:+.2g}"
    text = f"{effect.mean:+.2g} [{effect.low:+.2g}, {effect.high:+.2g}]"
    if not effect.beyond_noise:
        return text
    return f"**{text}** {'✓' if (effect.mean > 0) == (better == 'higher') else '✗'}"


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def draw(config: LossStudyConfig, names: list[str]) -> None:
    """reconstructions.png and interpolations.png, of the first seed."""
    folder, strips = Path(config.output_dir), []
    rebuilt: dict[str, Tensor] = {}
    for name in names:
        place = run_folder(config, name, config.seeds[0])
        subject, _ = prepare(str(place), config.dataset_name, analysis_config(config))
        if not rebuilt:
            rebuilt["original"] = as_bytes(subject.pixels[:6])
        rebuilt[name] = as_bytes(first_images(subject, 6))
        strips.append((name, interpolate(subject)))
    for file, picture in (
        ("reconstructions.png", draw_comparison(rebuilt, side=96)),
        ("interpolations.png", draw_strips(strips)),
    ):
        picture.save(folder / f".{file}")
        (folder / f".{file}").replace(folder / file)


def as_bytes(images: Tensor) -> Tensor:
    """`[-1, 1]` to uint8."""
    return ((images.clamp(-1, 1) / 2 + 0.5) * 255).round().to(torch.uint8).cpu()


@torch.no_grad()
def first_images(subject: Subject, count: int) -> Tensor:
    """Reconstructions of the first `count` images."""
    return subject.batched(subject.decode_quantized, subject.latents[:count])


@torch.no_grad()
def interpolate(subject: Subject, frames: int = 9) -> Tensor:
    """The way from the first image to the second, through continuous latents: `(frames, 3, H, W)`."""
    start, end = (subject.centred[number].expand(frames, *subject.centred.shape[1:]) for number in (0, 1))
    return subject.decode_centred(slerp(start, end, torch.linspace(0, 1, frames, device=start.device)))


def draw_gradients_at_z(logs: dict[str, list[list[dict[str, float]]]]) -> Figure:
    """
    What arrives at z of each loss: one column per variant, norms above, cosines with the sum of all below; a thin line
    per seed, a thick one for their mean.

    Args:
        logs (`dict`): Variant -> one list of log rows per seed, all with the same steps.
    """
    figure = Figure(figsize=(2.1 * len(logs) + 0.5, 4.6), layout="constrained")
    norms, cosines = map(list, figure.subplots(2, len(logs), sharex=True, sharey="row", squeeze=False))
    for above, below, (name, seeds) in zip(norms, cosines, logs.items(), strict=True):
        for number, term in enumerate(TERMS):
            for axes, kind in ((above, "gradient"), (below, "cosine")):
                key, curves = f"{kind}_z_{term}", []
                for rows in seeds:
                    points = {row["step"]: row[key] for row in rows if key in row}
                    axes.plot(list(points), list(points.values()), linewidth=0.5, color=f"C{number}", alpha=0.6)
                    curves.append(points)
                steps = sorted(set.intersection(*(set(points) for points in curves)))
                means = [statistics.fmean(points[step] for points in curves) for step in steps]
                axes.plot(steps, means, linewidth=2, color=f"C{number}", label=term)
        above.set_title(name, fontsize=9)
        below.set_xlabel("step", fontsize=8)
    norms[0].set(yscale="log", ylabel="norm at z")
    cosines[0].set(ylim=(-1.05, 1.05), ylabel="cosine with the sum of all")
    cosines[-1].legend(fontsize=7, loc="lower left")
    return figure
