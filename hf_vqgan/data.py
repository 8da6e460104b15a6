"""From a dataset on the Hub or on disk to batches of pixel_values in [-1, 1]."""

import importlib.util
import io
import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Sampler
from torchvision.transforms import v2

from .image_processing_vqgan import crop_to_multiple, to_rgb

logger = logging.getLogger(__name__)

PACKAGE_PREFIX = "package:"


def find_image_folder(name: str) -> str:
    """
    Resolve `package:NAME/FOLDER`, images that ship inside an installed Python package, to their folder on disk.

    Raises:
        FileNotFoundError: if the package is not installed or has no such folder.
    """
    package, _, folder = name.removeprefix(PACKAGE_PREFIX).partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"dataset {name!r}: the package {package!r} is not installed. For the quickstart's photographs, run "
            "`pip install scikit-image`, or install hf_vqgan with its extra [quickstart]."
        )
    path = Path(spec.submodule_search_locations[0]) / folder
    if not path.is_dir():
        raise FileNotFoundError(f"dataset {name!r}: {path} is not a folder.")
    return str(path)


def load_image_datasets(
    dataset_name: str,
    *,
    dataset_config_name: str | None = None,
    train_split: str = "train",
    validation_split: str | None = None,
    validation_size: int = 64,
    train_files: list[str] | None = None,
    validation_files: list[str] | None = None,
    image_column: str | None = None,
    max_train_samples: int | None = None,
    max_validation_samples: int | None = None,
    cache_dir: str | None = None,
    revision: str | None = None,
    seed: int = 0,
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """
    The train and validation images, as datasets with one column `image` of undecoded files.

    Args:
        dataset_name (`str`): A Hub id; a local path that `datasets.load_dataset` reads (parquet, imagefolder, ...); or
            `package:NAME/FOLDER`, images inside an installed Python package.
        validation_split (`str`, *optional*): `None` takes `validation`, else `test`, else holds out `validation_size`
            images (at most a tenth) of the train split at random.
        train_files, validation_files (`list[str]`, *optional*): Patterns of files inside the dataset, per split.
        image_column (`str`, *optional*): `None` takes the only image column.

    Raises:
        FileNotFoundError, ValueError: for a dataset that is not there, has no such split or column, or an empty split.
    """
    data_files = {"train": train_files, "validation": validation_files} if train_files else None
    if data_files and not validation_files:
        del data_files["validation"]
    splits = load_splits(dataset_name, dataset_config_name, data_files, cache_dir, revision)
    if validation_split is None:
        validation_split = next((name for name in ("validation", "test") if name in splits), None)
    for name in filter(None, (train_split, validation_split)):
        if name not in splits:
            raise ValueError(f"dataset {dataset_name!r} has no split {name!r}; it has {', '.join(splits)}.")
        if len(splits[name]) == 0:
            raise ValueError(f"dataset {dataset_name!r}: split {name!r} is empty.")
    train = _image_column(splits[train_split], dataset_name, image_column)
    if validation_split is not None:
        validation = _image_column(splits[validation_split], dataset_name, image_column)
    else:
        held_out = min(validation_size, max(1, len(train) // 10))
        if len(train) <= held_out:
            raise ValueError(f"dataset {dataset_name!r} has {len(train)} image(s): none is left to hold out.")
        halves = train.train_test_split(test_size=held_out, seed=seed)
        train, validation = halves["train"], halves["test"]
    return _first(train, max_train_samples), _first(validation, max_validation_samples)


def load_splits(
    dataset_name: str,
    dataset_config_name: str | None = None,
    data_files: dict[str, list[str]] | None = None,
    cache_dir: str | None = None,
    revision: str | None = None,
) -> datasets.DatasetDict:
    """All splits of a dataset, with all their columns; for the arguments see `load_image_datasets`."""
    if dataset_name.startswith(PACKAGE_PREFIX):
        folder = find_image_folder(dataset_name)
        patterns = data_files or {"train": ["**"]}
        data_files = {split: [f"{folder}/{pattern}" for pattern in files] for split, files in patterns.items()}
        return datasets.load_dataset("imagefolder", data_files=data_files, cache_dir=cache_dir, drop_labels=True)
    try:
        return datasets.load_dataset(
            dataset_name, dataset_config_name, data_files=data_files, cache_dir=cache_dir, revision=revision
        )
    except ValueError as error:
        if "corresponds to no data" not in str(error):
            raise
        raise ValueError(f"dataset {dataset_name!r} has an empty split: {error}") from error


def _first(dataset: datasets.Dataset, count: int | None) -> datasets.Dataset:
    return dataset if count is None else dataset.select(range(min(count, len(dataset))))


def find_image_column(dataset: datasets.Dataset, dataset_name: str, image_column: str | None) -> str:
    """`image_column`, or the only image column if it is `None`. Raises ValueError if there is no such column."""
    columns = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    if image_column is None and len(columns) != 1:
        raise ValueError(
            f"dataset {dataset_name!r} has {'no' if not columns else 'several'} image columns"
            f"{'' if not columns else ' (' + ', '.join(columns) + ')'}; its columns are "
            f"{', '.join(dataset.column_names)}. Name the one to use with --image_column."
        )
    image_column = image_column or columns[0]
    if image_column not in columns:
        raise ValueError(
            f"dataset {dataset_name!r}: {image_column!r} is not an image column; image columns: "
            f"{', '.join(columns) or 'none'}; all columns: {', '.join(dataset.column_names)}."
        )
    return image_column


def _image_column(dataset: datasets.Dataset, dataset_name: str, image_column: str | None) -> datasets.Dataset:
    image_column = find_image_column(dataset, dataset_name, image_column)
    # Undecoded: a broken image is then ours to skip and count, instead of an exception inside the data loader.
    dataset = dataset.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    return dataset if image_column == "image" else dataset.rename_column(image_column, "image")


class UnreadableImage(Exception):
    """An entry of the dataset that PIL cannot decode."""


def decode_image(entry: dict) -> Image.Image:
    """
    `{"bytes": ..., "path": ...}`, as `datasets` stores undecoded images, to 8-bit RGB.

    Raises:
        UnreadableImage: whatever PIL raises on a broken file, with the file's name.
    """
    try:
        source = io.BytesIO(entry["bytes"]) if entry["bytes"] is not None else entry["path"]
        with Image.open(source) as image:
            return to_rgb(image)
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error, DecompressionBombError, ...
        raise UnreadableImage(f"{(entry or {}).get('path') or 'image without a path'}: {error}") from error


@dataclass
class ImageTransform:
    """
    How an image becomes training pixels: shorter side to `resize` pixels, a `resolution`-pixel square, maybe a flip.

    Args:
        resolution (`int`): Side of the training squares.
        resize (`int`, *optional*): Shorter side before cropping; `None` means `resolution`, 0 keeps the image's size.
        center_crop (`bool`): The central square instead of a random one.
        random_flip (`bool`): Mirror half of the squares.
    """

    resolution: int
    resize: int | None = None
    center_crop: bool = False
    random_flip: bool = True

    def __post_init__(self):
        if self.resize is None:
            self.resize = self.resolution
        if 0 < self.resize < self.resolution:
            raise ValueError(
                f"resize={self.resize} is smaller than resolution={self.resolution}: nothing to crop from."
            )

    def scale(self, image: Image.Image) -> Tensor:
        """RGB image to uint8 `(3, H, W)`, H and W at least `resolution`."""
        side = max(self.resize or min(image.size), self.resolution)
        pixels = v2.functional.pil_to_tensor(image)
        return v2.functional.resize(pixels, [side], interpolation=v2.InterpolationMode.BICUBIC, antialias=True)

    def crop(self, pixels: Tensor, rng: random.Random) -> Tensor:
        """uint8 `(3, H, W)` to float `(3, resolution, resolution)` in [-1, 1]."""
        if self.center_crop:
            pixels = v2.functional.center_crop(pixels, [self.resolution] * 2)
        else:
            top, left = (rng.randint(0, side - self.resolution) for side in pixels.shape[1:])
            pixels = v2.functional.crop(pixels, top, left, self.resolution, self.resolution)
        if self.random_flip and rng.random() < 0.5:
            pixels = v2.functional.horizontal_flip(pixels)
        return to_pixel_values(pixels)


def to_pixel_values(pixels: Tensor) -> Tensor:
    """uint8 to float in [-1, 1]."""
    return pixels.float() / 127.5 - 1


class TrainingImages(torch.utils.data.Dataset):
    """
    Map-style training set in which everything random about sample number n is a function of (seed, n).

    Sample numbers count on across epochs (`EpochSampler`): n // len(self) is the epoch, n % len(self) the item, so
    neither the number of processes and workers nor an interruption changes what is seen.

    Items are `{"pixel_values", "unreadable", "upscaled"}`. An unreadable image is replaced by the next readable one
    and counted; so is an image smaller than the crop, which is enlarged.

    Args:
        crops_per_image (`int`): Items per image and epoch: small sets of large images are worth several crops.
        cache_bytes (`int`): Keep up to this many bytes of decoded and scaled images, per data-loading process.
    """

    def __init__(
        self,
        images: datasets.Dataset,
        transform: ImageTransform,
        seed: int = 0,
        crops_per_image: int = 1,
        cache_bytes: int = 2**28,
    ):
        self.images, self.transform, self.seed, self.crops_per_image = images, transform, seed, crops_per_image
        self.cache: dict[int, tuple[Tensor, bool]] = {}
        self.cache_room = cache_bytes
        self.reported: set[str] = set()

    def __len__(self) -> int:
        return len(self.images) * self.crops_per_image

    def __getitem__(self, number: int) -> dict[str, Any]:
        first = number % len(self) // self.crops_per_image
        for skipped in range(len(self.images)):
            try:
                pixels, upscaled = self._scaled((first + skipped) % len(self.images))
            except UnreadableImage as error:
                if str(error) not in self.reported:  # once, not once an epoch
                    self.reported.add(str(error))
                    logger.warning("skipped an unreadable image: %s", error)
                continue
            crop = self.transform.crop(pixels, random.Random(f"{self.seed} {number}"))
            return {"pixel_values": crop, "unreadable": skipped, "upscaled": int(upscaled)}
        raise UnreadableImage(f"not one of the {len(self.images)} training images can be read.")

    def _scaled(self, item: int) -> tuple[Tensor, bool]:
        """The decoded image at its working size, and whether it had to be enlarged for the crop."""
        if item in self.cache:
            return self.cache[item]
        image = decode_image(self.images[item]["image"])
        scaled = self.transform.scale(image), min(image.size) < self.transform.resolution
        if scaled[0].nbytes <= self.cache_room:
            self.cache[item] = scaled
            self.cache_room -= scaled[0].nbytes
        return scaled


class EpochBatchSampler(Sampler[list[int]]):
    """
    Batches of sample numbers, epoch after epoch without a seam, for a given number of batches.

    Every epoch is a permutation of its own, a function of (seed, epoch). Starting at a later batch costs nothing and
    gives what an uninterrupted run would have seen.

    Args:
        num_samples (`int`): Samples per epoch.
        batch_size (`int`): Samples per batch and process.
        num_batches (`int`): How many batches, of all processes together, to yield.
        start (`int`): How many batches to pass over first.
    """

    def __init__(self, num_samples: int, batch_size: int, num_batches: int, seed: int = 0, start: int = 0):
        self.num_samples, self.batch_size, self.num_batches = num_samples, batch_size, num_batches
        self.seed, self.start = seed, start

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        numbers = self._numbers(self.start * self.batch_size)
        for _ in range(self.num_batches):
            yield [next(numbers) for _ in range(self.batch_size)]

    def _numbers(self, position: int) -> Iterator[int]:
        while True:
            epoch, offset = divmod(position, self.num_samples)
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            for item in torch.randperm(self.num_samples, generator=generator)[offset:].tolist():
                yield epoch * self.num_samples + item
            position = (epoch + 1) * self.num_samples


class ValidationImages(torch.utils.data.Dataset):
    """
    The validation images as `(3, H, W)` in [-1, 1], the same ones every time: scaled as in training, then whole
    (cut to multiples of `size_divisor`) or the central square. Unreadable images are left out, with a warning.
    """

    def __init__(self, images: datasets.Dataset, transform: ImageTransform, whole: bool, size_divisor: int):
        self.images, self.transform, self.whole, self.size_divisor = images, transform, whole, size_divisor
        self.readable = [item for item in range(len(images)) if self._is_readable(item)]

    def _is_readable(self, item: int) -> bool:
        try:
            decode_image(self.images[item]["image"])
        except UnreadableImage as error:
            logger.warning("left out an unreadable validation image: %s", error)
            return False
        return True

    def __len__(self) -> int:
        return len(self.readable)

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < len(self):
            raise IndexError(index)
        pixels = self.transform.scale(decode_image(self.images[self.readable[index]]["image"]))
        if self.whole:
            return to_pixel_values(crop_to_multiple(pixels, self.size_divisor))
        return to_pixel_values(v2.functional.center_crop(pixels, [self.transform.resolution] * 2))
