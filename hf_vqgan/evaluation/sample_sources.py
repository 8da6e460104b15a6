"""
Where images to be judged come from: pipelines that make them, folders and archives that hold them, a dataset's split.

All of them give uint8 squares by number. Image number i of a pipeline is a function of (seed, i): neither the batch
size nor the number of processes changes its noise, and a sweep over guidance scales starts from the same noise.
"""

import inspect
import itertools
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as tvF

from ..data.datasets import ImageTransform, decode_image
from ..data.images import CentralSquares, DatasetSource, check_splits, first_rows, only_image_column, read_classes
from ..data.randomness import rng, torch_rng
from ..files.image_archives import ImageArchive, read_image_archive
from ..files.sources import check_source
from ..pipelines import VQGANLatentDiffusionPipeline, count_classes

logger = logging.getLogger(__name__)

COUNT_PARAMETERS = ("batch_size", "num_images", "num_images_per_prompt")  # what pipelines call it
PICTURE_FILES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


# ---------------------------------------------------------------------------------------------------------------------
# Images that are there


@dataclass(frozen=True)
class DatasetRows:
    """
    Rows of a split, and which of their columns count.

    Args:
        images (`datasets.Dataset`): With one column `image` of undecoded files.
        labels (`list[int]`, *optional*): Class of every row.
    """

    split: str
    images: datasets.Dataset
    labels: list[int] | None = None

    def squares(self, transform: ImageTransform) -> CentralSquares:
        return CentralSquares.of_rows(self.images, transform)

    def class_counts(self) -> list[int] | None:
        """How many rows each class has; `None` without a class column."""
        return None if self.labels is None else np.bincount(self.labels).tolist()


def open_splits(config) -> tuple[DatasetRows, DatasetRows | None]:
    """
    The reference images, and the held-out ones if there are such.

    Args:
        config: With `dataset_name`, `dataset_config_name`, `dataset_revision`, `cache_dir`, `split`, `held_out_split`,
            `image_column`, `class_column` and `max_samples`.

    Raises:
        ValueError: for a split or column that is not there, or an empty split.
    """
    splits = DatasetSource.of(config.dataset_name, config).load_splits()
    if config.held_out_split is not None:
        held_out = None if config.held_out_split == "none" else config.held_out_split
    else:
        others = (name for name in ("validation", "test") if name in splits and name != config.split)
        held_out = next(others, None)
    reference = _open_split(splits, config.split, config, config.class_column)
    return reference, _open_split(splits, held_out, config) if held_out is not None else None


def _open_split(splits: datasets.DatasetDict, split: str, config, class_column: str | None = None) -> DatasetRows:
    check_splits(splits, config.dataset_name, split)
    rows = first_rows(splits[split], config.max_samples)
    images = only_image_column(rows, config.dataset_name, config.image_column)
    return DatasetRows(split, images, read_classes(rows, class_column)[0] if class_column is not None else None)


def archive_squares(archive: ImageArchive, transform: ImageTransform) -> CentralSquares:
    """The images of an archive that has some."""
    return CentralSquares(partial(_open_array, archive.images), len(archive.images), transform)


def _open_array(images: np.ndarray, item: int) -> Image.Image:
    return Image.fromarray(images[item])


class StoredSamples:
    """
    Samples made elsewhere: a folder of pictures in the order of their names, or an archive (.npz).

    Raises:
        ValueError: if there are none.
    """

    kind = "images"
    takes_guidance = False

    def __init__(self, name: str):
        self.name = name
        self.archive = read_image_archive(name) if Path(name).is_file() else None
        self.files = [] if self.archive else _find_pictures(name)
        if self.archive is not None and self.archive.images is None:
            raise ValueError(f"{name}: holds statistics and no images; name it as --reference.")

    def __len__(self) -> int:
        return len(self.files) if self.archive is None else len(self.archive.images)

    def side(self) -> int:
        """The shorter side of the first image."""
        if self.archive is not None:
            return min(self.archive.images.shape[1:3])
        return min(self._open(0).size)

    def squares(self, transform: ImageTransform, count: int) -> CentralSquares:
        """Of the first `count` of them."""
        open_image = self._open if self.archive is None else partial(_open_array, self.archive.images)
        return CentralSquares(open_image, min(count, len(self)), transform)

    def _open(self, item: int) -> Image.Image:
        return decode_image({"bytes": None, "path": str(self.files[item])}, f"file {item}")


def _find_pictures(folder: str) -> list[Path]:
    files = sorted(file for file in Path(folder).rglob("*") if file.suffix.lower() in PICTURE_FILES)
    if not files or Path(folder, "config.json").is_file():  # a model, whose run has left pictures of its own
        raise ValueError(
            f"{folder}: neither a pipeline (model_index.json) nor a folder of pictures ({', '.join(PICTURE_FILES)})."
        )
    return files


# ---------------------------------------------------------------------------------------------------------------------
# Pipelines


@dataclass(frozen=True)
class SamplingOptions:
    """
    Args:
        seed (`int`): Of all noise.
        num_inference_steps (`int`, *optional*): `None`: the pipeline's own default.
        class_balance (`str`, *optional*): `"dataset"`, `"uniform"` or `"none"`. `None`: as the dataset has them, if it
            has classes, else uniform.
        class_counts (`Sequence[int]`, *optional*): How many images of each class the dataset has.
    """

    seed: int = 0
    num_inference_steps: int | None = None
    class_balance: str | None = None
    class_counts: Sequence[int] | None = None


class PipelineSamples:
    """
    Images of a diffusers pipeline, whichever class it has: what it is called with is what its signature takes.

    Args:
        pipeline (`DiffusionPipeline`): Returns `.images`.
        name (`str`): As the user called it.
        autocast (`Callable`): Context in which it is called.

    Raises:
        ValueError: for a pipeline that needs more than classes, or takes no generator; for options that it does not
            take, and classes that it does not know.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        name: str,
        options: SamplingOptions,
        autocast: Callable[[], AbstractContextManager],
    ):
        self.pipeline, self.name, self.options, self.autocast = pipeline, name, options, autocast
        self.kind = type(pipeline).__name__
        self.parameters = inspect.signature(pipeline.__call__).parameters
        self.num_classes = count_pipeline_classes(pipeline) if "class_labels" in self.parameters else 0
        needed = [name for name, parameter in self.parameters.items() if parameter.default is parameter.empty]
        unknown = set(needed) - {"class_labels", "args", "kwargs"}
        if unknown or "generator" not in self.parameters:
            problem = f"needs {', '.join(sorted(unknown))}" if unknown else "takes no generator, which noise comes from"
            raise ValueError(f"{name}: {self.kind} {problem}; sample it elsewhere and name the folder of images.")
        if "class_labels" in needed and options.class_balance == "none":
            raise ValueError(f"{name}: {self.kind} makes no images without classes. Leave out --class_balance none.")
        if options.num_inference_steps is not None and "num_inference_steps" not in self.parameters:
            raise ValueError(f"{name}: {self.kind} takes no num_inference_steps. Leave them out.")
        self.takes_guidance = "guidance_scale" in self.parameters and (
            "class_labels" not in self.parameters or bool(self.num_classes)
        )
        # Of one generator for several images, each would depend on the others.
        self.one_at_a_time = "list" not in str(self.parameters["generator"].annotation).lower()

    def side(self) -> int:
        """The shorter side of its images, of which it makes one: what cannot work fails here, before the long run."""
        return min(self.sample([0], self.labels(1)).shape[2:])

    def labels(self, count: int) -> list[int] | None:
        """The classes of images 0 to `count` - 1; `None` for none."""
        balance = self.options.class_balance
        if not self.num_classes or balance == "none":
            return None
        weights: Sequence[int] = [1] * self.num_classes
        if balance != "uniform" and self.options.class_counts is not None:
            weights = self.options.class_counts
            if len(weights) > self.num_classes:
                raise ValueError(
                    f"{self.name} knows {self.num_classes} classes, and the dataset has {len(weights)}: it was trained "
                    "on others. --class_balance uniform takes the classes that it knows."
                )
        return share_out(weights, count, self.options.seed)

    def sample(self, numbers: list[int], labels: list[int] | None, guidance_scale: float | None = None) -> Tensor:
        """
        Images by number, uint8 `(B, 3, H, W)` on the CPU.

        Args:
            labels (`list[int]`, *optional*): Classes of all numbers, not only of these.
            guidance_scale (`float`, *optional*): `None`: the pipeline's own default.
        """
        if self.one_at_a_time and len(numbers) > 1:
            return torch.cat([self.sample([number], labels, guidance_scale) for number in numbers])
        generators = [torch_rng(self.options.seed, "sample", number) for number in numbers]
        wanted: dict[str, Any] = {"generator": generators[0] if self.one_at_a_time else generators}
        if labels is not None:
            wanted["class_labels"] = [labels[number] for number in numbers]
        else:
            known = (name for name in COUNT_PARAMETERS if name in self.parameters)
            wanted |= {name: len(numbers) for name in itertools.islice(known, 1)}
        options = {"num_inference_steps": self.options.num_inference_steps, "guidance_scale": guidance_scale}
        wanted |= {name: value for name, value in options.items() if value is not None}
        wanted |= {"output_type": "np"} if "output_type" in self.parameters else {}
        with torch.no_grad(), self.autocast():
            images = to_uint8(self.pipeline(**wanted).images)
        if len(images) != len(numbers):
            raise ValueError(f"{self.name}: {self.kind} made {len(images)} image(s) instead of {len(numbers)}.")
        return images


def load_samples_from(name: str, options: SamplingOptions, accelerator: Accelerator) -> PipelineSamples | StoredSamples:
    """
    A pipeline's folder or Hub name, a folder of pictures, or an archive of images.

    Raises:
        FileNotFoundError, ConnectionError: if there is no such thing, or it cannot be reached.
        ValueError: if it holds neither.
    """
    path = Path(name)
    if path.is_file() or (path.is_dir() and not (path / "model_index.json").is_file()):
        return StoredSamples(name)
    check_source(name)
    try:
        pipeline = DiffusionPipeline.from_pretrained(name)
    except AttributeError as error:  # a class that diffusers does not have
        raise ValueError(f"{name}: {error}; is the package that the pipeline needs installed?") from error
    pipeline.set_progress_bar_config(disable=True)
    return PipelineSamples(pipeline.to(accelerator.device), name, options, accelerator.autocast)


def count_pipeline_classes(pipeline: DiffusionPipeline) -> int:
    """How many classes it can be asked for; 0 if it is unconditional."""
    if isinstance(pipeline, VQGANLatentDiffusionPipeline):
        return count_classes(pipeline.denoiser)
    for component in pipeline.components.values():
        for field in ("num_classes", "num_embeds_ada_norm", "num_class_embeds"):
            count = getattr(getattr(component, "config", None), field, None)
            if isinstance(count, int):
                return count
    return 0


def share_out(weights: Sequence[int], count: int, seed: int) -> list[int]:
    """
    `count` class numbers in the proportions of `weights`, to one image exactly (largest remainders), in an order that
    `seed` shuffles.
    """
    exact = [count * weight / sum(weights) for weight in weights]
    shares = [math.floor(share) for share in exact]
    remainders = sorted(range(len(exact)), key=lambda number: shares[number] - exact[number])
    for number in remainders[: count - sum(shares)]:
        shares[number] += 1
    labels = [number for number, share in enumerate(shares) for _ in range(share)]
    rng(seed, "classes of samples").shuffle(labels)
    return labels


def to_uint8(images: Any) -> Tensor:
    """What pipelines return - arrays `(B, H, W, C)` or tensors `(B, C, H, W)` in [0, 1], or PIL images - as uint8
    `(B, 3, H, W)`, rounded as diffusers rounds for PIL."""
    if isinstance(images, (list, tuple)):
        if isinstance(images[0], Image.Image):
            return torch.stack([tvF.pil_to_tensor(image.convert("RGB")) for image in images])
        images = torch.stack([torch.as_tensor(image) for image in images])
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(images).permute(0, 3, 1, 2)
    images = images.float().cpu()
    if not images.isfinite().all():
        raise ValueError(
            "a pipeline's images are not finite: in fp16, networks may overflow; try --mixed_precision no."
        )
    images = (images.clamp(0, 1) * 255).round().to(torch.uint8)
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images[:, :3]
