"""
The door to images: which rows of which dataset, and their central squares.

    images = open_images(ImageOptions("user/photos", resolution=256, max_samples=1000))
    for batch in images.squares().batches(16):
        batch.pixels  # (B, 3, 256, 256) in [-1, 1], upright; unreadable ones are left out, with a warning
        batch.rows    # where they are among the rows, for images.rows and read_classes(images.rows, "label")
"""

import dataclasses
import glob
import importlib.util
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from ..files.sources import check_source
from .datasets import ImageTransform, UnreadableImage, decode_image, row_of, to_pixel_values

logger = logging.getLogger(__name__)

PACKAGE_PREFIX = "package:"
MAX_CLASSES = 1_000_000  # ids of persons or images, taken for classes, would need an embedding each

# Patterns of files that `datasets` reads with a builder of this name.
FILE_BUILDERS = {".tar": "webdataset", ".parquet": "parquet"}


@dataclass(frozen=True)
class DatasetSource:
    """
    Which dataset.

    Args:
        dataset_name (`str`): A Hub id; a local path that `datasets.load_dataset` reads (parquet, imagefolder, a folder
            of webdataset tars, ...); a pattern of parquet or tar files (`shards/*.tar`); or `package:NAME/FOLDER`,
            images inside an installed Python package.
        dataset_revision (`str`, *optional*): Branch, tag or commit, on the Hub.
        image_column (`str`, *optional*): `None` takes the only image column.
    """

    dataset_name: str
    dataset_config_name: str | None = None
    dataset_revision: str | None = None
    image_column: str | None = None
    cache_dir: str | None = None

    @classmethod
    def of(cls, dataset_name: str, settings, **others):
        """The options for which `settings`, some configuration, has a field of that name; `others` come first."""
        names = {field.name for field in dataclasses.fields(cls)} & vars(settings).keys()
        return cls(**{name: getattr(settings, name) for name in names} | {"dataset_name": dataset_name} | others)

    def load_splits(self, data_files: dict[str, list[str]] | None = None, streaming: bool = False):
        """All splits with all their columns; see the function `load_splits`."""
        place = self.dataset_config_name, data_files, self.cache_dir, self.dataset_revision
        return load_splits(self.dataset_name, *place, streaming)


@dataclass(frozen=True)
class TrainingOptions(DatasetSource):
    """
    Which of a dataset's images to train on, and which to hold out.

    Args:
        validation_split (`str`, *optional*): `None` takes `validation`, else `test`, else holds out `validation_size`
            images of the train split: at random and at most a tenth, or of a stream the first ones.
        train_files, validation_files (`list[str]`, *optional*): Patterns of files inside the dataset, per split.
        max_train_samples, max_validation_samples (`int`, *optional*): Only the first so many.
    """

    train_split: str = "train"
    validation_split: str | None = None
    validation_size: int = 64
    train_files: list[str] | None = None
    validation_files: list[str] | None = None
    max_train_samples: int | None = None
    max_validation_samples: int | None = None
    seed: int = 0

    def data_files(self) -> dict[str, list[str]] | None:
        """`data_files` for `load_splits`; `None` if no files are named."""
        if self.validation_files and not self.train_files:
            raise ValueError(
                f"validation_files={self.validation_files} needs train_files too: name the training files."
            )
        files = {"train": self.train_files, "validation": self.validation_files}
        return {split: patterns for split, patterns in files.items() if patterns} or None


@dataclass(frozen=True)
class ImageOptions(DatasetSource):
    """
    Which images of one split, and how they are cut.

    Args:
        split (`str`, *optional*): `None` takes `validation`, else `test`, else the only split there is.
        max_samples (`int`, *optional*): Only the first so many rows.
        shuffle_seed (`int`, *optional*): Shuffle the rows first.
        resolution (`int`): Side of the central square.
        resize (`int`, *optional*): Shorter side before cropping; `None` means `resolution`, 0 keeps the image's size.
    """

    split: str | None = None
    max_samples: int | None = None
    shuffle_seed: int | None = None
    resolution: int = 256
    resize: int | None = None

    def transform(self) -> ImageTransform:
        return ImageTransform(self.resolution, self.resize, center_crop=True, random_flip=False)


# ---------------------------------------------------------------------------------------------------------------------
# One split


@dataclass(frozen=True)
class SplitImages:
    """
    The rows of a split that were asked for.

    Args:
        rows (`datasets.Dataset`): With all their columns.
        split (`str`): Where they are from.
        split_note (`str`, *optional*): Warns of a split that was not asked for and may be what models were trained on.
    """

    options: ImageOptions
    rows: datasets.Dataset
    split: str
    split_note: str | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def commit(self) -> str | None:
        """The commit of a Hub dataset, as the names of its files have it."""
        found = (re.search(r"@([0-9a-f]{40})/", name) for name in self.rows.info.download_checksums or ())
        return next((match[1] for match in found if match), None)

    def squares(self) -> "CentralSquares":
        options = self.options
        images = only_image_column(self.rows, options.dataset_name, options.image_column)
        return CentralSquares.of_rows(images, options.transform())


@dataclass
class Square:
    """The central square of one row, uint8 `(3, resolution, resolution)`; or `error`, why it cannot be read."""

    row: int
    pixels: Tensor | None = None
    enlarged: bool = False
    error: str | None = None


@dataclass
class SquareBatch:
    """
    Args:
        rows (`list[int]`): Where the images are among the rows.
        squares (`Tensor` of shape `(B, 3, resolution, resolution)`): uint8.
        enlarged (`list[bool]`): Whether the image was smaller than its square.
    """

    rows: list[int]
    squares: Tensor
    enlarged: list[bool]

    @property
    def pixels(self) -> Tensor:
        """`(B, 3, resolution, resolution)` in [-1, 1]."""
        return to_pixel_values(self.squares)


class CentralSquares(torch.utils.data.Dataset):
    """
    The central squares of images by row.

    Args:
        open_image (`Callable[[int], Image.Image]`): The upright RGB image of a row; raises `UnreadableImage`.
        count (`int`): How many rows there are.
    """

    def __init__(self, open_image: Callable[[int], Image.Image], count: int, transform: ImageTransform):
        self.open_image, self.count, self.transform = open_image, count, transform

    @classmethod
    def of_rows(cls, images: datasets.Dataset, transform: ImageTransform, first_row: int = 0) -> "CentralSquares":
        """
        The squares of a dataset's rows.

        Args:
            images (`datasets.Dataset`): With one column `image` of undecoded files, as `only_image_column` gives it.
            first_row (`int`): For names of unreadable images: where in the split a part of it begins.
        """
        return cls(partial(_open_row, images, first_row), len(images), transform)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> Square:
        try:
            image = self.open_image(row)
        except UnreadableImage as error:
            return Square(row, error=str(error))
        return Square(row, self.transform.central_square(image), min(image.size) < self.transform.resolution)

    def batches(
        self, batch_size: int, num_workers: int = 0, rank: int = 0, world_size: int = 1
    ) -> Iterator[SquareBatch]:
        """
        Batches of `batch_size` rows, less the unreadable ones, which are named in a warning; process `rank` gets every
        `world_size`-th.
        """
        loader = DataLoader(
            self,
            batch_sampler=cut_into_batches(len(self), batch_size, rank, world_size),
            num_workers=num_workers,
            collate_fn=list,
            generator=torch.Generator(),  # the loader draws a number: not from the caller's generator
        )
        for squares in loader:
            for square in squares:
                if square.error is not None:
                    logger.warning("left out an unreadable image: %s", square.error)
            readable = [square for square in squares if square.error is None]
            if readable:
                numbers, pixels, enlarged = zip(*((one.row, one.pixels, one.enlarged) for one in readable), strict=True)
                yield SquareBatch(list(numbers), torch.stack(pixels), list(enlarged))

    def read_all(self) -> SquareBatch | None:
        """All that can be read, at once; `None` if nothing can."""
        return next(self.batches(len(self)), None)


def cut_into_batches(count: int, batch_size: int, rank: int = 0, world_size: int = 1) -> list[list[int]]:
    """The numbers below `count` in batches, of which process `rank` gets every `world_size`-th."""
    batches = [list(range(start, min(start + batch_size, count))) for start in range(0, count, batch_size)]
    return batches[rank::world_size]


def _open_row(images: datasets.Dataset, first_row: int, row: int) -> Image.Image:
    return decode_image(images[row]["image"], row_of(images, row, first_row))


def open_images(options: ImageOptions) -> SplitImages:
    """
    The rows that the options name.

    Raises:
        FileNotFoundError, ValueError: for a dataset that is not there, has no such split or column, or an empty split.
    """
    splits, name = options.load_splits(), options.dataset_name
    split = options.split or next((known for known in ("validation", "test") if known in splits), None)
    split_note = None
    if split is None and len(splits) == 1:
        (split,) = splits
        split_note = (
            f"dataset {name!r} has no split for validation or test: these are images of {split!r}, its only split. "
            "Figures of models that were trained on them flatter; compare models that were not."
        )
    if split is None:
        raise ValueError(
            f"dataset {name!r} has no split 'validation' or 'test', and several others: name one of "
            f"{', '.join(splits)} with --split."
        )
    check_splits(splits, name, split)
    find_image_column(splits[split], name, options.image_column)
    rows = splits[split] if options.shuffle_seed is None else splits[split].shuffle(seed=options.shuffle_seed)
    return SplitImages(options, first_rows(rows, options.max_samples), split, split_note)


def read_classes(rows: datasets.Dataset, column: str) -> tuple[list[int], dict[int, str]]:
    """
    Class number of every row, and the names of all classes.

    Raises:
        ValueError: for a column that is not there, or does not hold numbers from 0 in every row; it names the first
            other value. For a number so large that it is no class.
    """
    if column not in rows.column_names:
        raise ValueError(f"class_column={column!r} is not a column; columns: {', '.join(rows.column_names)}.")
    labels, feature = rows[column][:], rows.features[column]
    for row, label in enumerate(labels):
        if not isinstance(label, int) or not 0 <= label < MAX_CLASSES:
            raise ValueError(
                f"class_column={column!r} is {feature}, with {label!r} in row {row}: expected class numbers from 0, "
                f"none missing and all below {MAX_CLASSES:,}."
            )
    names = feature.names if isinstance(feature, datasets.ClassLabel) else [str(n) for n in range(max(labels) + 1)]
    return list(map(int, labels)), dict(enumerate(names))  # true and false are 1 and 0


# ---------------------------------------------------------------------------------------------------------------------
# Training and validation


def load_image_datasets(options: TrainingOptions) -> tuple[datasets.Dataset, datasets.Dataset]:
    """
    The train and validation images, as datasets with one column `image` of undecoded files.

    Raises:
        FileNotFoundError, ValueError: for a dataset that is not there, has no such split or column, or an empty split.
    """
    splits, name = options.load_splits(options.data_files()), options.dataset_name
    validation_split = find_validation_split(splits, options)
    train = only_image_column(splits[options.train_split], name, options.image_column)
    if validation_split is not None:
        validation = only_image_column(splits[validation_split], name, options.image_column)
    else:
        held_out = min(options.validation_size, max(1, len(train) // 10))
        if len(train) <= held_out:
            raise ValueError(f"dataset {name!r} has {len(train)} image(s): none is left to hold out.")
        halves = train.train_test_split(test_size=held_out, seed=options.seed)
        train, validation = halves["train"], halves["test"]
    return first_rows(train, options.max_train_samples), first_rows(validation, options.max_validation_samples)


def load_train_images(options: TrainingOptions) -> datasets.Dataset:
    """All training images of one more dataset, of which none are held out; see `load_image_datasets`."""
    splits, split = options.load_splits(options.data_files()), options.train_split
    check_splits(splits, options.dataset_name, split)
    return first_rows(
        only_image_column(splits[split], options.dataset_name, options.image_column), options.max_train_samples
    )


def find_validation_split(splits: dict, options: TrainingOptions) -> str | None:
    """`validation_split`, or which split serves by default, if any. Raises ValueError for splits not there or empty."""
    split = options.validation_split or next((name for name in ("validation", "test") if name in splits), None)
    check_splits(splits, options.dataset_name, options.train_split, *([split] if split else []))
    return split


# ---------------------------------------------------------------------------------------------------------------------
# Datasets, splits and columns


def load_splits(
    dataset_name: str,
    dataset_config_name: str | None = None,
    data_files: dict[str, list[str]] | None = None,
    cache_dir: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    """All splits of a dataset, with all their columns; see [`DatasetSource`]."""
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


def check_splits(splits: dict, dataset_name: str, *names: str) -> None:
    """Raises ValueError for splits that are not there or empty."""
    for name in names:
        if name not in splits:
            raise ValueError(f"dataset {dataset_name!r} has no split {name!r}; it has {', '.join(splits)}.")
        if isinstance(splits[name], datasets.Dataset) and len(splits[name]) == 0:
            raise ValueError(f"dataset {dataset_name!r}: split {name!r} is empty.")


def first_rows(dataset: datasets.Dataset, count: int | None) -> datasets.Dataset:
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
