"""
Generated images against real ones: distances, precision and recall, copies of training images.

    for every set of images - reference, held-out, one per pipeline and guidance scale - the processes share the images,
    keep a row of features per image, and add up the tables, so that each has all rows in order;
    then everything is a pure function of two tables (measurement/generation.py).
"""

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torchvision.transforms.v2 import functional as tvF
from tqdm.auto import tqdm

from ..data.datasets import ImageTransform, to_pixel_values
from ..data.images import CentralSquares, cut_into_batches
from ..files.image_archives import ImageArchive, read_image_archive
from ..files.options import MAX_SEED, check_values, option
from ..generation.encoded_dataset import weights_sha256
from ..measurement.feature_networks import (
    LPIPS_NETWORKS,
    FeatureNetwork,
    InceptionNetwork,
    LPIPSNetwork,
    VisionModelNetwork,
)
from ..measurement.frechet import FeatureMoments, Gaussian, frechet_distance, inception_score
from ..measurement.generation import compare_distributions, memorization_ratio, moments_of, nearest
from ..measurement.metrics import sum_over_processes
from ..training.setup import share_cpu_threads
from .comparison import full_precision
from .generation_report import (
    LIBRARIES,
    SCORE_PARTS,
    GenerationProtocol,
    GenerationReport,
    GenerationResult,
    file_name,
    name_figures,
    titles,
    write_generation,
)
from .report import library_versions
from .sample_sources import (
    DatasetRows,
    PipelineSamples,
    SamplingOptions,
    StoredSamples,
    archive_squares,
    load_samples_from,
    open_splits,
)

logger = logging.getLogger(__name__)

Batches = Iterable[tuple[list[int], Tensor]]  # numbers of images, and uint8 (B, 3, side, side)
NEAREST_SHOWN = 3
CANDIDATES = 256  # samples whose pixels are kept to show those that are closest to a real image


@dataclass
class GenerationConfig:
    """How generated images are judged. Every field is a flag of `hf-vqgan evaluate-generation`."""

    dataset_name: str | None = option(None, "Real images to compare with: Hub name, local path or package:NAME/FOLDER.")
    reference: str | None = option(
        None, "Archive (.npz) of real images (arr_0), or of their Inception statistics (mu, sigma), to compare with."
    )
    output_dir: str = option(
        "runs/generation", "Folder for generation.json, generation.md and the pictures.", nonempty=True
    )
    dataset_config_name: str | None = option(None, "Configuration of the dataset.")
    dataset_revision: str | None = option(None, "Branch, tag or commit of a Hub dataset.")
    split: str = option("train", "Split to compare with, and to look for copies of.", nonempty=True)
    held_out_split: str | None = option(
        None, "Real images that models have not seen, judged beside them. Default: `validation`, else `test`; or none."
    )
    image_column: str | None = option(None, "Column with the images. Default: the only image column.")
    class_column: str | None = option(None, "Column with class numbers, whose proportions samples get.")
    cache_dir: str | None = option(None, "Where `datasets` keeps what it downloads.")
    max_samples: int | None = option(None, "Only the first so many real images per split. Default: all.", at_least=2)
    resolution: int | None = option(None, "Side of the squares. Default: that of the first samples.", at_least=1)
    resize: int | None = option(
        None, "Shorter side of real images before cropping. Default: resolution. 0: keep the image's size.", at_least=0
    )
    num_samples: int = option(10_000, "Images per pipeline and guidance scale.", at_least=2)
    batch_size: int = option(32, "Images per forward pass.", at_least=1)
    seed: int = option(0, "Of all noise: sample number i depends on it and on i alone.", at_least=0, at_most=MAX_SEED)
    guidance_scale: list[float] = option([], "One or several: a sweep with its curve. Default: the pipeline's own.")
    num_inference_steps: int | None = option(None, "Steps of the sampler. Default: the pipeline's own.", at_least=1)
    class_balance: str | None = option(
        None,
        "Classes of samples: as in the dataset, all alike, or none. Default: as class_column has it, else uniform.",
        choices=("dataset", "uniform", "none"),
    )
    features: list[str] = option(
        ["auto"],
        "Networks to compare in: inception, lpips_alex, lpips_vgg, or a vision model's Hub name or folder, such as "
        "facebook/dinov2-base. auto: Inception, or LPIPS where its weights cannot be had.",
        nonempty=True,
    )
    inception_weights_path: str | None = option(None, "torch-fidelity's Inception weights. Default: cache or download.")
    alex_weights_path: str | None = option(None, "AlexNet for LPIPS. Default: found as docs/evaluation.md says.")
    vgg_weights_path: str | None = option(None, "VGG16 for LPIPS. Default: found as docs/evaluation.md says.")
    mixed_precision: str = option("no", "Autocast of pipelines, not of features.", choices=("no", "bf16", "fp16"))
    pictures: int = option(25, "Samples shown per pipeline.", at_least=0)
    neighbours: int = option(8, "Samples shown beside their nearest real images.", at_least=0)
    save_samples: bool = option(False, "Keep every sample as a PNG below output_dir/samples.")
    dataloader_num_workers: int = option(0, "Processes that load images, per process.", at_least=0)
    cpu_threads: int | None = option(None, "Threads per process on CPU. Default: the cores shared evenly.", at_least=1)

    def __post_init__(self):
        check_values(self)
        if self.dataset_name is None and self.reference is None:
            raise ValueError("nothing to compare with: name real images by --dataset_name or --reference.")
        if self.dataset_name is None and (self.class_column or self.class_balance == "dataset"):
            raise ValueError("class_column and class_balance=dataset need --dataset_name.")
        if self.class_balance == "dataset" and self.class_column is None:
            raise ValueError("class_balance=dataset needs --class_column.")


# ---------------------------------------------------------------------------------------------------------------------
# Networks


def load_networks(
    config: GenerationConfig, resolution: int, device: torch.device
) -> tuple[list[FeatureNetwork], dict[str, str]]:
    """
    The networks that `config.features` names, and what could not be had, with the reason.

    Raises:
        FileNotFoundError, ConnectionError: for a network or weights that were named and cannot be had.
        ValueError: for images that are too small for a network, and two networks of one name.
    """
    skipped: dict[str, str] = {}
    networks = []
    for name in dict.fromkeys(config.features):
        if name == "auto":
            network, skipped = _load_default(config, resolution)
        elif name == "inception":
            network = InceptionNetwork(config.inception_weights_path)
        elif name in LPIPS_NETWORKS:
            network = LPIPSNetwork(name, getattr(config, f"{LPIPS_NETWORKS[name]}_weights_path"))
        else:
            network = VisionModelNetwork(name)
        if isinstance(network, LPIPSNetwork) and resolution < network.min_side:
            raise ValueError(f"features {network.id!r} need images of {network.min_side} pixels, not {resolution}.")
        networks.append(network.to(device))
    ids = [network.id for network in networks]
    if double := [name for name in ids if ids.count(name) > 1]:
        raise ValueError(f"features {config.features}: two would have the name {double[0]!r}.")
    return networks, skipped


def _load_default(config: GenerationConfig, resolution: int) -> tuple[FeatureNetwork, dict[str, str]]:
    try:
        return InceptionNetwork(config.inception_weights_path), {}
    except FileNotFoundError as error:
        if config.inception_weights_path is not None:
            raise
        reason = str(error)
    net = "alex" if resolution >= 31 else "vgg"
    return LPIPSNetwork(f"lpips_{net}", getattr(config, f"{net}_weights_path")), {"inception": reason}


# ---------------------------------------------------------------------------------------------------------------------
# Features of a set of images


class SetFeatures:
    """
    What one set of images comes to in all networks: this process's share until `gather`, then everybody's.

    Args:
        count (`int`): N, of all processes, readable or not.
        networks (`list[FeatureNetwork]`): Their features are kept, in float32 on the CPU.
        shown (`int`): Of how many images, the first ones, pixels are kept.
        side (`int`): Of the images.
    """

    def __init__(self, count: int, networks: list[FeatureNetwork], shown: int, side: int):
        self.networks = networks
        self.readable = torch.zeros(count, dtype=torch.uint8)
        self.pictures = torch.zeros(min(shown, count), 3, side, side, dtype=torch.uint8)
        self.pooled = {network.id: torch.zeros(count, network.dim) for network in networks}
        self.spatial = {network.id: FeatureMoments(network.spatial_dim) for network in networks if network.spatial_dim}
        self.logits = {network.id: torch.zeros(count, network.logits_dim) for network in networks if network.logits_dim}

    def add(self, numbers: list[int], pixels: Tensor, device: torch.device) -> None:
        """Images by number, uint8 `(B, 3, side, side)`."""
        self.readable[numbers] = 1
        for number, image in zip(numbers, pixels, strict=True):
            if number < len(self.pictures):
                self.pictures[number] = image
        for network in self.networks:
            with full_precision():
                found = network(to_pixel_values(pixels.to(device)))
            self.pooled[network.id][numbers] = found.pooled.cpu()
            if found.spatial is not None:
                self.spatial[network.id].update(found.spatial)
            if found.logits is not None:
                self.logits[network.id][numbers] = found.logits.cpu()

    def gather(self, device: torch.device) -> "SetFeatures":
        """Every process's share becomes that of all, without images that could not be read."""
        readable = sum_over_processes(self.readable, device).bool()
        self.rows = readable.nonzero()[:, 0].tolist()
        self.pictures = sum_over_processes(self.pictures, device)[readable[: len(self.pictures)]]
        for tables in (self.pooled, self.logits):
            for name, table in tables.items():
                tables[name] = sum_over_processes(table, device)[readable]
        self.spatial = {name: moments.over_processes(device) for name, moments in self.spatial.items()}
        return self

    def __len__(self) -> int:
        return len(self.rows)


@dataclass
class Workplace:
    """What every set of images is measured with."""

    accelerator: Accelerator
    config: GenerationConfig
    networks: list[FeatureNetwork]
    transform: ImageTransform

    def measure(self, batches: Batches, count: int, title: str, shown: int = 0) -> SetFeatures:
        """Features of all images of all processes, whose own share `batches` is."""
        found = SetFeatures(count, self.networks, shown, self.transform.resolution)
        bar = tqdm(total=count, desc=title, unit=" images", disable=not self.accelerator.is_local_main_process)
        for numbers, pixels in batches:
            found.add(numbers, pixels, self.accelerator.device)
            bar.update(len(numbers) * self.accelerator.num_processes)
        bar.close()
        found.gather(self.accelerator.device)
        if not len(found):
            raise ValueError(f"{title}: not one of {count} images can be read.")
        return found

    def measure_stored(self, squares: CentralSquares, title: str, shown: int = 0) -> SetFeatures:
        config, accelerator = self.config, self.accelerator
        share = accelerator.process_index, accelerator.num_processes
        batches = squares.batches(config.batch_size, config.dataloader_num_workers, *share)
        return self.measure(((batch.rows, batch.squares) for batch in batches), len(squares), title, shown)

    def draw_samples(self, source: PipelineSamples, guidance_scale: float | None, folder: Path | None) -> Batches:
        """This process's samples, cut to squares; each is kept as a file in `folder`, if there is one."""
        labels, side = source.labels(self.config.num_samples), self.transform.resolution
        share = self.accelerator.process_index, self.accelerator.num_processes
        for numbers in cut_into_batches(self.config.num_samples, self.config.batch_size, *share):
            pixels = source.sample(numbers, labels, guidance_scale)
            if min(pixels.shape[2:]) != side:
                pixels = tvF.resize(pixels, [side], tvF.InterpolationMode.BICUBIC, antialias=True)
            pixels = tvF.center_crop(pixels, [side, side])
            if folder is not None:
                _save_pictures(folder, numbers, pixels)
            yield numbers, pixels


def _save_pictures(folder: Path, numbers: list[int], pixels: Tensor) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in zip(numbers, pixels, strict=True):
        tvF.to_pil_image(image).save(folder / f"{number:06d}.png")


# ---------------------------------------------------------------------------------------------------------------------
# The reference


@dataclass
class Reference:
    """
    What generated images are compared with.

    Args:
        features (`SetFeatures`, *optional*): Of the real images that distances are measured to, if there are images.
        gaussians, spatial (`dict`): By network, for Fréchet distances.
        train (`SetFeatures`, *optional*): Of the dataset's images, among which copies are looked for.
    """

    features: SetFeatures | None
    gaussians: dict[str, FeatureMoments | Gaussian]
    spatial: dict[str, FeatureMoments | Gaussian]
    train: SetFeatures | None


def measure_reference(place: Workplace, dataset: DatasetRows | None, archive: ImageArchive | None) -> Reference:
    """
    Everything about real images, once for all comparisons: those of the archive, else of the dataset, and statistics of
    the archive where it has some.
    """
    features = train = None
    if dataset is not None:
        features = train = place.measure_stored(dataset.squares(place.transform), "real images")
    if archive is not None and archive.images is not None:
        features = place.measure_stored(archive_squares(archive, place.transform), "reference")
    gaussians: dict[str, FeatureMoments | Gaussian] = {}
    spatial: dict[str, FeatureMoments | Gaussian] = {}
    if features is not None and len(features) > 1:
        gaussians |= {name: moments_of(pooled) for name, pooled in features.pooled.items()}
        spatial |= features.spatial
    if archive is not None and (network := statistics_owner(archive, place.networks)) is not None:
        gaussians[network.id] = _as_gaussian(archive.moments)
        if archive.spatial_moments is not None and len(archive.spatial_moments[0]) == network.spatial_dim:
            spatial[network.id] = _as_gaussian(archive.spatial_moments)
    return Reference(features, gaussians, spatial, train)


def statistics_owner(archive: ImageArchive, networks: list[FeatureNetwork]) -> FeatureNetwork | None:
    """
    The network whose features the archive's statistics are of: Inception, or without its images the first one that is
    asked for; `None` if the archive's images serve instead.

    Raises:
        ValueError: for statistics of other features, where there are no images to make them from.
    """
    if archive.moments is None:
        return None
    dim = len(archive.moments[0])
    inception = [network for network in networks if network.is_inception]
    if not inception and archive.images is not None:
        return None
    network = (inception or networks)[0]
    if network.dim != dim:
        raise ValueError(
            f"{archive.path}: statistics of {dim} features, but these have {network.dim}. Inception's are 2048: name "
            "--features inception, or the network that they were made with."
        )
    return network


def _as_gaussian(moments: tuple[np.ndarray, np.ndarray]) -> Gaussian:
    mean, covariance = (torch.from_numpy(array) for array in moments)
    return Gaussian(mean, covariance)


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def make_figures(made: SetFeatures, reference: Reference, held_out: SetFeatures | None, device: torch.device) -> dict:
    """Figures of a set of images by name, of all networks; what cannot be had is left out."""
    figures: dict[str, float] = {}
    for network in made.networks:
        own = made.pooled[network.id].to(device)
        real = reference.features.pooled[network.id].to(device) if reference.features is not None else None
        measures = compare_distributions(own, real, reference.gaussians.get(network.id))
        found = dict(vars(measures))
        if network.id in made.spatial and network.id in reference.spatial and len(made) > 1:
            found["sfid"] = frechet_distance(reference.spatial[network.id], made.spatial[network.id])
        if network.id in made.logits and len(made) >= SCORE_PARTS:
            score = inception_score(made.logits[network.id], SCORE_PARTS)
            found |= dict(zip(("inception_score", "inception_score_std"), score, strict=True))
        if reference.train is not None:
            train = reference.train.pooled[network.id].to(device)
            found["nearest_distance"] = float(nearest(own, train)[0].median())
            if held_out is not None:
                others = held_out.pooled[network.id].to(device)
                found["memorization_ratio"] = memorization_ratio(own, others, train)
        figures |= name_figures(network, found)
    return figures


def find_closest(made: SetFeatures, train: SetFeatures, count: int) -> tuple[list[int], list[list[int]]]:
    """
    The `count` shown samples that are closest to a real image, in the first network's features, and the rows of the
    real images that are nearest to each.
    """
    name = made.networks[0].id
    distances, rows = nearest(made.pooled[name][: len(made.pictures)], train.pooled[name], NEAREST_SHOWN)
    order = distances[:, 0].argsort()[:count].tolist()
    return order, [[train.rows[row] for row in rows[sample].tolist()] for sample in order]


# ---------------------------------------------------------------------------------------------------------------------


def evaluate_generation(names: list[str], config: GenerationConfig) -> GenerationResult:
    """
    Compare samples with real images, and write generation.json, generation.md and pictures to `config.output_dir`. Any
    number of processes and any batch size gives the same figures but for rounding.

    Args:
        names (`list[str]`): Pipelines (Hub names or folders), folders of pictures, archives of images (.npz).

    Raises:
        ValueError, FileNotFoundError, OSError: for what is not there or does not fit.
    """
    place, subjects = prepare(names, config)
    accelerator, device = place.accelerator, measuring_device(place.accelerator)
    reference = measure_reference(place, subjects.dataset, subjects.archive)
    held_out = None
    if subjects.held_out is not None:
        held_out = place.measure_stored(subjects.held_out.squares(place.transform), "held-out images")

    # Set by set, of which only figures and a few pictures are kept
    runs = [(source, scale) for source in subjects.sources for scale in _scales(source, config)]
    labels = titles([(source.name, scale) for source, scale in runs])
    reports, samples, closest = [], {}, {}
    for (source, scale), label in zip(runs, labels, strict=True):
        started = time.perf_counter()
        made = measure_samples(place, source, scale, label)
        speed = len(made) / (time.perf_counter() - started) if isinstance(source, PipelineSamples) else None
        figures = make_figures(made, reference, held_out, device)
        reports.append(GenerationReport(source.name, source.kind, scale, len(made), figures, speed))
        samples[label] = made.pictures[: config.pictures]
        if reference.train is not None and config.neighbours and accelerator.is_main_process:
            closest[label] = show_closest(place, subjects.dataset, made, reference.train, label)

    of_held_out = None
    if held_out is not None:
        figures = make_figures(held_out, reference, None, device)
        of_held_out = GenerationReport(subjects.held_out.split, "held_out", None, len(held_out), figures)
    protocol = describe_protocol(place, subjects, reference)
    result = GenerationResult(reports, labels, of_held_out, protocol, subjects.skipped)
    if accelerator.is_main_process:
        write_generation(result, samples, closest, Path(config.output_dir))
    accelerator.wait_for_everyone()
    return result


@dataclass
class Subjects:
    """
    What is compared, opened and tried.

    Args:
        sources (`list`): Of generated images.
        dataset, held_out (`DatasetRows`, *optional*): Real images, and those that models have not seen.
        archive (`ImageArchive`, *optional*): The reference, if it is not the dataset.
        skipped (`dict`): What could not be had, with the reason.
    """

    sources: list[PipelineSamples | StoredSamples]
    dataset: DatasetRows | None
    held_out: DatasetRows | None
    archive: ImageArchive | None
    skipped: dict[str, str]


def prepare(names: list[str], config: GenerationConfig) -> tuple[Workplace, Subjects]:
    """Open everything and make one image with every pipeline: what cannot work fails here, before the long run."""
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    share_cpu_threads(config, accelerator)
    archive = read_image_archive(config.reference) if config.reference is not None else None
    with accelerator.main_process_first():  # one process fills the caches, the others read them
        dataset, held_out = open_splits(config) if config.dataset_name is not None else (None, None)
        counts = dataset.class_counts() if dataset is not None else None
        options = SamplingOptions(config.seed, config.num_inference_steps, config.class_balance, counts)
        sources = [load_samples_from(name, options, accelerator) for name in names]
        if config.guidance_scale and not any(source.takes_guidance for source in sources):
            raise ValueError(f"guidance_scale={config.guidance_scale}: none of {', '.join(names)} takes guidance.")
        sides = [source.side() for source in sources]
        resolution = config.resolution or sides[0]
        if config.resolution is None and len(set(sides)) > 1:
            raise ValueError(f"samples of different sizes, {sides}: say at which --resolution to compare them.")
        networks, skipped = load_networks(config, resolution, accelerator.device)
    if archive is not None:
        statistics_owner(archive, networks)
        if dataset is None and archive.images is None and len(networks) > 1:
            raise ValueError(f"{archive.path}: statistics are of one network's features; features={config.features}.")
    if "inception" in skipped and accelerator.is_main_process:
        logger.warning("no FID: %s Figures are in the features of %s instead.", skipped["inception"], networks[0].id)
    place = Workplace(accelerator, config, networks, ImageTransform(resolution, config.resize, True, False))
    return place, Subjects(sources, dataset, held_out, archive, skipped)


def _scales(source: PipelineSamples | StoredSamples, config: GenerationConfig) -> list[float | None]:
    return list(dict.fromkeys(config.guidance_scale)) if source.takes_guidance and config.guidance_scale else [None]


def measure_samples(
    place: Workplace, source: PipelineSamples | StoredSamples, guidance_scale: float | None, title: str
) -> SetFeatures:
    """Features of `num_samples` samples, or of as many as there are."""
    config = place.config
    shown = max(config.pictures, config.neighbours and CANDIDATES)
    if isinstance(source, StoredSamples):
        return place.measure_stored(source.squares(place.transform, config.num_samples), title, shown)
    folder = Path(config.output_dir, "samples", file_name(title)) if config.save_samples else None
    return place.measure(place.draw_samples(source, guidance_scale, folder), config.num_samples, title, shown)


def measuring_device(accelerator: Accelerator) -> torch.device:
    """Where tables of features are compared: in float64, which MPS has not."""
    return accelerator.device if accelerator.device.type == "cuda" else torch.device("cpu")


def describe_protocol(place: Workplace, subjects: Subjects, reference: Reference) -> GenerationProtocol:
    config = place.config
    return GenerationProtocol(
        dataset=config.dataset_name,
        split=subjects.dataset.split if subjects.dataset is not None else None,
        held_out_split=subjects.held_out.split if subjects.held_out is not None else None,
        reference=config.reference,
        num_reference_images=len(reference.features) if reference.features is not None else None,
        resolution=place.transform.resolution,
        resize=place.transform.resize,
        num_samples=config.num_samples,
        seed=config.seed,
        num_inference_steps=config.num_inference_steps,
        class_column=config.class_column,
        class_balance=config.class_balance,
        features={
            network.id: network.details | {"weights_sha256": weights_sha256(network)} for network in place.networks
        },
        mixed_precision=config.mixed_precision,
        batch_size=config.batch_size,
        processes=place.accelerator.num_processes,
        versions=library_versions(LIBRARIES),
    )


def show_closest(
    place: Workplace, dataset: DatasetRows, made: SetFeatures, train: SetFeatures, title: str
) -> dict[str, Tensor]:
    """
    Columns of neighbours.png, uint8 `(neighbours, 3, side, side)`: the samples that are closest to a real image, and
    the real images that are closest to each.
    """
    squares = dataset.squares(place.transform)
    samples, rows = find_closest(made, train, place.config.neighbours)
    columns = {title: made.pictures[samples]}
    for rank, of_rank in enumerate(zip(*rows, strict=True), start=1):
        name = "nearest real" if rank == 1 else f"no. {rank}"
        columns[name] = torch.stack([squares[row].pixels for row in of_rank])
    return columns
