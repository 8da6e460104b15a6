"""From undecoded images to pixel_values in [-1, 1]: decoding, cutting, and the batches of training sets."""

import bisect
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
from typing import Any

import datasets
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torchvision.transforms import v2

from ..image_processing_vqgan import check_aspect_ratio, crop_to_multiple, to_rgb
from .randomness import rng, torch_rng

logger = logging.getLogger(__name__)


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


def row_of(images: datasets.Dataset, item: int, first_row: int = 0) -> str:
    """
    Where an item was in the dataset before it was shuffled, or others were held out. `datasets` counts a part that is
    all in one piece from 0: `first_row` is then where it begins.
    """
    moved = images._indices
    return f"row {first_row + (item if moved is None else moved.column(0)[item].as_py())}"


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

    def crop(self, pixels: Tensor, draws: random.Random) -> Tensor:
        """uint8 `(3, H, W)` to float `(3, resolution, resolution)` in [-1, 1]."""
        if self.center_crop:
            pixels = v2.functional.center_crop(pixels, [self.resolution] * 2)
        else:
            top, left = (draws.randint(0, side - self.resolution) for side in pixels.shape[1:])
            pixels = v2.functional.crop(pixels, top, left, self.resolution, self.resolution)
        if self.random_flip and draws.random() < 0.5:
            pixels = v2.functional.horizontal_flip(pixels)
        return to_pixel_values(pixels)

    def central_square(self, image: Image.Image) -> Tensor:
        """RGB image to the uint8 square `(3, resolution, resolution)` in its middle."""
        return v2.functional.center_crop(self.scale(image), [self.resolution] * 2)


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
        name (`str`): Tells this set from others, in names of images and in what is random.
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
        return shuffled_epochs(len(self), self.seed, start, self.name)

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
            crop = self.transform.crop(pixels, rng(self.seed, f"{self.name}crop", number))
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

    def __init__(self, weights: Sequence[float], seed: int = 0, purpose: str = "mixture", block_size: int = 1000):
        if not all(0 < weight < float("inf") for weight in weights):
            raise ValueError(f"dataset_weights={list(weights)} must all be positive.")
        edges = [round(block_size * part / sum(weights)) for part in itertools.accumulate(weights)]
        self.quotas = [edge - before for before, edge in zip([0, *edges], edges, strict=False)]
        if 0 in self.quotas:
            raise ValueError(f"dataset_weights={list(weights)}: none may be below 1/{block_size} of their sum.")
        self.edges, self.seed, self.purpose, self.block_size = edges, seed, purpose, block_size

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
        slots = rng(self.seed, self.purpose, block).sample(range(self.block_size), self.block_size)
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
        TrainingImages(source, transform, seed, crops_per_image, name=f"dataset {number}, ")
        for number, source in enumerate(sources, start=1)
    ]
    return MixedImages(images, weights, seed)


def shuffled_epochs(num_samples: int, seed: int, start: int = 0, name: str = "") -> Iterator[int]:
    """
    Sample numbers from the `start`-th on, epoch after epoch without a seam: `epoch * num_samples + item`.

    Every epoch is a permutation of its own, a function of (seed, name of the set, epoch). Starting late costs nothing
    and gives what an uninterrupted run would have seen.
    """
    while True:
        epoch, offset = divmod(start, num_samples)
        order = torch.randperm(num_samples, generator=torch_rng(seed, f"{name}order", epoch))
        for item in order[offset:].tolist():
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
            break
        yield batch
    else:
        return
    del batches  # which ends the workers; the error's traceback would keep them
    raise batch


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

    @property
    def split(self) -> str | None:
        """The split that they are from, if it is known."""
        return None if self.images.split is None else str(self.images.split)

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
        image = self._decode(self.readable[index])
        if self.whole:
            return to_pixel_values(crop_to_multiple(self.transform.scale(image), self.size_divisor))
        return to_pixel_values(self.transform.central_square(image))
