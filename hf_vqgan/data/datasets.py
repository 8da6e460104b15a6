"""From a dataset on the Hub or on disk to batches of pixel_values in [-1, 1]."""

import bisect
import glob
import importlib.util
import io
import itertools
import logging
import os
import random
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torchvision.transforms import v2

from ..files.sources import check_source
from ..image_processing_vqgan import check_aspect_ratio, crop_to_multiple, to_rgb

logger = logging.getLogger(__name__)

PACKAGE_PREFIX = "package:"

# Patterns of files that `datasets` reads with a builder of this name.
FILE_BUILDERS = {".tar": "webdataset", ".parquet": "parquet"}


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
        dataset_name (`str`): A Hub id; a local path that `datasets.load_dataset` reads (parquet, imagefolder, a folder
            of webdataset tars, ...); a pattern of parquet or tar files (`shards/*.tar`); or `package:NAME/FOLDER`,
            images inside an installed Python package.
        validation_split (`str`, *optional*): `None` takes `validation`, else `test`, else holds out `validation_size`
            images (at most a tenth) of the train split at random.
        train_files, validation_files (`list[str]`, *optional*): Patterns of files inside the dataset, per split.
        image_column (`str`, *optional*): `None` takes the only image column.

    Raises:
        FileNotFoundError, ValueError: for a dataset that is not there, has no such split or column, or an empty split.
    """
    data_files = files_by_split(train_files, validation_files)
    splits = load_splits(dataset_name, dataset_config_name, data_files, cache_dir, revision)
    validation_split = find_validation_split(splits, dataset_name, train_split, validation_split)
    train = only_image_column(splits[train_split], dataset_name, image_column)
    if validation_split is not None:
        validation = only_image_column(splits[validation_split], dataset_name, image_column)
    else:
        held_out = min(validation_size, max(1, len(train) // 10))
        if len(train) <= held_out:
            raise ValueError(f"dataset {dataset_name!r} has {len(train)} image(s): none is left to hold out.")
        halves = train.train_test_split(test_size=held_out, seed=seed)
        train, validation = halves["train"], halves["test"]
    return _first(train, max_train_samples), _first(validation, max_validation_samples)


def load_train_images(
    dataset_name: str,
    *,
    train_split: str = "train",
    image_column: str | None = None,
    max_train_samples: int | None = None,
    cache_dir: str | None = None,
) -> datasets.Dataset:
    """All training images of one more dataset, of which none are held out; see `load_image_datasets`."""
    splits = load_splits(dataset_name, cache_dir=cache_dir)
    find_validation_split(splits, dataset_name, train_split, train_split)
    return _first(only_image_column(splits[train_split], dataset_name, image_column), max_train_samples)


def files_by_split(train_files: list[str] | None, validation_files: list[str] | None) -> dict[str, list[str]] | None:
    """`data_files` for `load_splits`; `None` if no files are named."""
    if validation_files and not train_files:
        raise ValueError(f"validation_files={validation_files} needs train_files too: name the training files.")
    files = {"train": train_files, "validation": validation_files}
    return {split: patterns for split, patterns in files.items() if patterns} or None


def load_splits(
    dataset_name: str,
    dataset_config_name: str | None = None,
    data_files: dict[str, list[str]] | None = None,
    cache_dir: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    """All splits of a dataset, with all their columns; for the arguments see `load_image_datasets`."""
    load = _open_streams if streaming else datasets.load_dataset
    if dataset_name.startswith(PACKAGE_PREFIX):
        folder = find_image_folder(dataset_name)
        patterns = data_files or {"train": ["**"]}
        data_files = {split: [f"{folder}/{pattern}" for pattern in files] for split, files in patterns.items()}
        return load("imagefolder", data_files=data_files, cache_dir=cache_dir, drop_labels=True)
    builder = FILE_BUILDERS.get(Path(dataset_name).suffix)
    if builder is not None and not Path(dataset_name).is_dir():
        if data_files:
            raise ValueError(f"dataset {dataset_name!r} names files: it takes no train_files or validation_files.")
        if "://" not in dataset_name and not glob.glob(dataset_name):
            raise FileNotFoundError(f"dataset {dataset_name!r}: there are no such files.")
        return load(builder, data_files={"train": dataset_name}, cache_dir=cache_dir)
    check_source(dataset_name, "dataset", cache_dir=cache_dir)
    try:
        return load(dataset_name, dataset_config_name, data_files=data_files, cache_dir=cache_dir, revision=revision)
    except ValueError as error:
        if "corresponds to no data" not in str(error):
            raise
        raise ValueError(f"dataset {dataset_name!r} has an empty split: {error}") from error


def _open_streams(*args, **kwargs) -> datasets.IterableDatasetDict:
    """`load_dataset(..., streaming=True)`, but image files of the Hub are left undecoded like all others."""
    builder = datasets.load_dataset_builder(*args, **kwargs)
    if hasattr(builder.config, "decode_num_threads"):
        builder.config.decode_num_threads = 0
    return builder.as_streaming_dataset()


def find_validation_split(
    splits: dict, dataset_name: str, train_split: str, validation_split: str | None
) -> str | None:
    """`validation_split`, or which split serves by default, if any. Raises ValueError for splits not there or empty."""
    if validation_split is None:
        validation_split = next((name for name in ("validation", "test") if name in splits), None)
    for name in filter(None, (train_split, validation_split)):
        if name not in splits:
            raise ValueError(f"dataset {dataset_name!r} has no split {name!r}; it has {', '.join(splits)}.")
        if isinstance(splits[name], datasets.Dataset) and len(splits[name]) == 0:
            raise ValueError(f"dataset {dataset_name!r}: split {name!r} is empty.")
    return validation_split


def _first(dataset: datasets.Dataset, count: int | None) -> datasets.Dataset:
    return dataset if count is None else dataset.select(range(min(count, len(dataset))))


def find_image_column(dataset: datasets.Dataset, dataset_name: str, image_column: str | None) -> str:
    """`image_column`, or the only image column if it is `None`. Raises ValueError if there is no such column."""
    if dataset.features is None:  # a stream may have to be looked into
        dataset = dataset._resolve_features()
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


def only_image_column(
    dataset: datasets.Dataset | datasets.IterableDataset, dataset_name: str, image_column: str | None
) -> datasets.Dataset | datasets.IterableDataset:
    """The dataset with its image column alone, called `image`, as undecoded files `{"bytes", "path"}`."""
    image_column = find_image_column(dataset, dataset_name, image_column)
    # Undecoded: a broken image is then ours to skip and count, instead of an exception inside the data loader.
    dataset = dataset.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    return dataset if image_column == "image" else dataset.rename_column(image_column, "image")


class UnreadableImage(ValueError):
    """
    An entry of a dataset that is no image, or none that can be used; the message says which and why.

    Args:
        name (`str`, *optional*): The entry's own name; see `image_name`.
    """

    def __init__(self, message: str, name: str | None = None):
        super().__init__(message)
        self.name = name


def decode_image(entry: dict | None, place: str = "image without a file name") -> Image.Image:
    """
    `{"bytes": ..., "path": ...}`, as `datasets` stores undecoded images, to upright 8-bit RGB
    ([`~image_processing_vqgan.to_rgb`]); of an animation or a file of several pages, the first.

    Every reader of datasets decodes here. Size and aspect ratio are checked before pixels are unpacked, so a small file
    cannot ask for much memory: PIL's limit is 2 * `PIL.Image.MAX_IMAGE_PIXELS`, 179 million pixels.

    Args:
        place (`str`): Where in the dataset the entry is, for the message.

    Raises:
        UnreadableImage: whatever is wrong with the file, with its name and place.
    """
    try:
        source = io.BytesIO(entry["bytes"]) if entry["bytes"] is not None else entry["path"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PIL, about metadata, and sizes that are large but within its limit
            with Image.open(source) as image:
                check_aspect_ratio(*image.size)
                return to_rgb(image)
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error, DecompressionBombError, ...
        name = image_name(entry, place)
        # PIL would repeat the name, or give the address of the bytes
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else error or type(error).__name__
        raise UnreadableImage(f"{name}: {reason}", name) from error


def image_name(entry: dict | None, place: str) -> str:
    """The entry's file, if it has a name, and its place in the dataset, which tells files of one name apart."""
    path = (entry or {}).get("path")
    return f"{path} ({place})" if path else place


def row_of(images: datasets.Dataset, item: int) -> str:
    """
    Where an item was in the dataset before it was shuffled, or others were held out; but `datasets` counts a part that
    is all in one piece from 0.
    """
    moved = images._indices
    return f"row {item if moved is None else moved.column(0)[item].as_py()}"


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

    Sample numbers count on across epochs (`shuffled_epochs`): n // len(self) is the epoch, n % len(self) the item, so
    neither the number of processes and workers nor an interruption changes what is seen.

    Items are `{"pixel_values", "row", "unreadable", "skipped", "upscaled"}`. In an unreadable image's place comes the
    next readable one, and `unreadable` is 1: over an epoch, it adds up to the unreadable images (times
    `crops_per_image`). `skipped` has the name of each image passed over, one image one name, and what is wrong with it;
    `row` is the number of the image shown. An image smaller than the crop is enlarged, and `upscaled` is 1.

    Args:
        name (`str`): In names of images, tells this set from others.
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
        name: str = "",
    ):
        self.name = name
        self.images, self.transform, self.seed, self.crops_per_image = images, transform, seed, crops_per_image
        self.cache: dict[int, tuple[Tensor, bool]] = {}
        self.cache_room = cache_bytes

    def __len__(self) -> int:
        return len(self.images) * self.crops_per_image

    def describe(self) -> str:
        return f"{len(self.images):,} training images"

    def keys(self, start: int) -> Iterator[int]:
        """What to look up for the samples from the `start`-th on, without end."""
        return shuffled_epochs(len(self), self.seed, start)

    def batch_keys(
        self, batch_size: int, start: int = 0, stop: int | None = None, rank: int = 0, world_size: int = 1
    ) -> Iterator[list[int]]:
        """Keys of the batches that `load_batches` describes."""
        return take_batches(self.keys(start * batch_size), batch_size, start, stop, rank, world_size)

    def __getitem__(self, number: int) -> dict[str, Any]:
        first = number % len(self) // self.crops_per_image
        skipped: dict[str, str] = {}
        for offset in range(len(self.images)):
            row = (first + offset) % len(self.images)
            try:
                pixels, upscaled = self._scaled(row)
            except UnreadableImage as error:
                skipped[error.name] = str(error)
                continue
            crop = self.transform.crop(pixels, random.Random(f"{self.seed} {number}"))
            counts = {"unreadable": int(bool(skipped)), "upscaled": int(upscaled)}
            return {"pixel_values": crop, "row": row, "skipped": skipped, **counts}
        raise UnreadableImage(
            f"not one of the {len(self.images)} training images can be read; {next(iter(skipped.values()))}"
        )

    def _scaled(self, row: int) -> tuple[Tensor, bool]:
        """The decoded image at its working size, and whether it had to be enlarged for the crop."""
        if row in self.cache:
            return self.cache[row]
        image = decode_image(self.images[row]["image"], self.name + row_of(self.images, row))
        scaled = self.transform.scale(image), min(image.size) < self.transform.resolution
        if scaled[0].nbytes <= self.cache_room:
            self.cache[row] = scaled
            self.cache_room -= scaled[0].nbytes
        return scaled


class Mixture:
    """
    In which order samples come from several sources, by weight: a function of (seed, sample number).

    Every block of `block_size` samples holds each source's share of them exactly, in an order of the block's own. So
    how many samples of each source come before sample n is known without counting up to n.

    Raises:
        ValueError: for weights that are not positive, or too small for one sample per block.
    """

    def __init__(self, weights: Sequence[float], seed: int = 0, block_size: int = 1000):
        if not all(0 < weight < float("inf") for weight in weights):
            raise ValueError(f"dataset_weights={list(weights)} must all be positive.")
        edges = [round(block_size * part / sum(weights)) for part in itertools.accumulate(weights)]
        self.quotas = [edge - before for before, edge in zip([0, *edges], edges, strict=False)]
        if 0 in self.quotas:
            raise ValueError(f"dataset_weights={list(weights)}: none may be below 1/{block_size} of their sum.")
        self.edges, self.seed, self.block_size = edges, seed, block_size

    def draw(self, start: int, open_source: Callable[[int, int], Iterator]) -> Iterator[tuple]:
        """
        `(source, its next item)` for the samples from the `start`-th on.

        Args:
            open_source (`Callable[[int, int], Iterator]`): Gives the items of a source from a given one on.
        """
        block, offset = divmod(start, self.block_size)
        before = self._plan(block)[:offset]
        items = [open_source(source, block * quota + before.count(source)) for source, quota in enumerate(self.quotas)]
        for number in itertools.count(block):
            for source in self._plan(number)[offset if number == block else 0 :]:
                yield source, next(items[source])

    def _plan(self, block: int) -> list[int]:
        slots = random.Random(f"mixture {self.seed} {block}").sample(range(self.block_size), self.block_size)
        return [bisect.bisect(self.edges, slot) for slot in slots]


class MixedImages(torch.utils.data.Dataset):
    """
    Several `TrainingImages`, each with its weight: the share of samples it gives, whatever its size.

    An epoch is as many samples as all have together, of which a small set with a large weight gives some repeatedly.
    Keys are (source, sample number in it).
    """

    def __init__(self, sources: list[TrainingImages], weights: list[float], seed: int = 0):
        self.sources, self.weights, self.mixture = sources, weights, Mixture(weights, seed)

    def __len__(self) -> int:
        return sum(len(source) for source in self.sources)

    def describe(self) -> str:
        parts = zip(self.weights, self.sources, strict=True)
        return "mixed " + " + ".join(f"{weight:g} x {len(source.images):,}" for weight, source in parts) + " images"

    def batch_keys(
        self, batch_size: int, start: int = 0, stop: int | None = None, rank: int = 0, world_size: int = 1
    ) -> Iterator[list[tuple[int, int]]]:
        """Keys of the batches that `load_batches` describes."""
        keys = self.mixture.draw(start * batch_size, lambda source, number: self.sources[source].keys(number))
        return take_batches(keys, batch_size, start, stop, rank, world_size)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor | int]:
        source, number = key
        return self.sources[source][number]


def map_style_images(
    sources: list[datasets.Dataset],
    transform: ImageTransform,
    seed: int = 0,
    crops_per_image: int = 1,
    weights: list[float] | None = None,
) -> TrainingImages | MixedImages:
    """One training set of several: mixed by weight, or with `weights=None` all together, every image once an epoch."""
    if weights is None:
        return TrainingImages(datasets.concatenate_datasets(sources), transform, seed, crops_per_image)
    images = [
        TrainingImages(source, transform, seed + n, crops_per_image, name=f"dataset {n + 1}, ")
        for n, source in enumerate(sources)
    ]
    return MixedImages(images, weights, seed)


def shuffled_epochs(num_samples: int, seed: int, start: int = 0) -> Iterator[int]:
    """
    Sample numbers from the `start`-th on, epoch after epoch without a seam: `epoch * num_samples + item`.

    Every epoch is a permutation of its own, a function of (seed, epoch). Starting late costs nothing and gives what an
    uninterrupted run would have seen.
    """
    while True:
        epoch, offset = divmod(start, num_samples)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        for item in torch.randperm(num_samples, generator=generator)[offset:].tolist():
            yield epoch * num_samples + item
        start = (epoch + 1) * num_samples


def take_batches(
    keys: Iterator, batch_size: int, start: int, stop: int | None, rank: int = 0, world_size: int = 1
) -> Iterator[list]:
    """Cut `keys`, which begin with batch number `start`, into batches; of these, every `world_size`-th is `rank`'s."""
    for number in itertools.count(start) if stop is None else range(start, stop):
        batch = list(itertools.islice(keys, batch_size))
        if number % world_size == rank:
            yield batch


def load_batches(
    dataset,
    batch_size: int,
    start: int = 0,
    stop: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[dict[str, Tensor]]:
    """
    One process's batches of a training set, on the CPU: `pixel_values` `(B, 3, H, W)`, `unreadable` and `upscaled`
    `(B,)`, and `skipped`, a dict from the names of unreadable images to what is wrong with them.

    Batch number b holds the samples b * batch_size to (b + 1) * batch_size - 1 of one sequence, the same for any
    number of processes; process `rank` loads the batches with b % world_size == rank. So n processes with batches of B
    see together, step by step, what one sees with batches of n * B, or with n batches of B.

    Args:
        dataset ([`TrainingImages`], [`MixedImages`] or [`StreamedImages`]): The training set.
        start, stop (`int`): Batch numbers, of all processes together, at which to start and before which to stop.
        num_workers (`int`): Processes that decode. They change nothing about the batches.

    Raises:
        UnreadableImage: where there is no readable image to take an unreadable one's place.
    """
    loader = DataLoader(
        _Batches(dataset),
        collate_fn=_as_is,
        batch_sampler=dataset.batch_keys(batch_size, start, stop, rank, world_size),
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_outlive_notices,
        generator=torch.Generator(),  # the loader draws a number: not from the run's generator, which is checkpointed
    )
    return _raising(iter(loader))


class _Batches(torch.utils.data.Dataset):
    """
    Whole batches of a training set, or the `UnreadableImage` that prevents one. Returned, not raised: from a worker,
    PyTorch would pass it on with the worker's traceback for its message.
    """

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitems__(self, keys: list) -> dict[str, Any] | UnreadableImage:
        try:
            if hasattr(self.dataset, "__getitems__"):
                samples = self.dataset.__getitems__(keys)
            else:
                samples = [self.dataset[key] for key in keys]
        except UnreadableImage as error:
            return error
        return collate_samples(samples)


def collate_samples(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Samples as one batch, with what each says of skipped images in one dict."""
    skipped = {name: reason for sample in samples for name, reason in sample["skipped"].items()}
    tensors = [{name: value for name, value in sample.items() if name != "skipped"} for sample in samples]
    return default_collate(tensors) | {"skipped": skipped}


def _as_is(batch):
    return batch


def _raising(batches: Iterator) -> Iterator[dict[str, Any]]:
    for batch in batches:
        if isinstance(batch, UnreadableImage):
            raise batch
        yield batch


def notices() -> list[signal.Signals]:
    """The signals that ask a run to save and stop: a cluster's, and Ctrl-C. Windows has no SIGUSR1."""
    return [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)]


def _outlive_notices(worker: int) -> None:
    """A notice goes to all processes of a job or a terminal: training needs its workers until it has saved."""
    for notice in notices():
        signal.signal(notice, signal.SIG_IGN)


def available_cores() -> int:
    """The cores this process may use, where the system says so (Linux), else all there are (macOS, Windows)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_num_workers() -> int:
    """Every core of this process's share but one, at most 8."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(0, min(8, available_cores() // processes - 1))


class WaitClock:
    """
    An iterator over `items` that knows which share of the time went into waiting for them.

        batches = WaitClock(batches)
        ...  # a few steps, each with next(batches)
        share = batches.share()  # since the last call
    """

    def __init__(self, items: Iterable):
        self.items = iter(items)
        self.waited, self.since = 0.0, time.perf_counter()

    def __iter__(self) -> Iterator:
        return self

    def __next__(self):
        started = time.perf_counter()
        item = next(self.items)
        self.waited += time.perf_counter() - started
        return item

    def share(self) -> float:
        """The share of the time since the last call (or the start) that was spent waiting, in [0, 1]. Starts anew."""
        now = time.perf_counter()
        share = self.waited / (now - self.since)
        self.waited, self.since = 0.0, now
        return share


class ValidationImages(torch.utils.data.Dataset):
    """
    The validation images as `(3, H, W)` in [-1, 1], the same ones every time: scaled as in training, then whole
    (cut to multiples of `size_divisor`) or the central square. Unreadable images are left out, with a warning.
    """

    def __init__(self, images: datasets.Dataset, transform: ImageTransform, whole: bool, size_divisor: int):
        self.images, self.transform, self.whole, self.size_divisor = images, transform, whole, size_divisor
        self.readable = [item for item in range(len(images)) if self._is_readable(item)]

    def _decode(self, item: int) -> Image.Image:
        return decode_image(self.images[item]["image"], row_of(self.images, item))

    def _is_readable(self, item: int) -> bool:
        try:
            self._decode(item)
        except UnreadableImage as error:
            logger.warning("left out an unreadable validation image: %s", error)
            return False
        return True

    def __len__(self) -> int:
        return len(self.readable)

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < len(self):
            raise IndexError(index)
        pixels = self.transform.scale(self._decode(self.readable[index]))
        if self.whole:
            return to_pixel_values(crop_to_multiple(pixels, self.size_divisor))
        return to_pixel_values(v2.functional.center_crop(pixels, [self.transform.resolution] * 2))
