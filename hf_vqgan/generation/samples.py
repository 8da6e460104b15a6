"""Rows of a dataset, of images or of what `encode_dataset.py` made of them, as the latents a diffusion model learns."""

import logging
import math

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from ..data.datasets import ImageTransform, TrainingImages, find_image_column
from ..measurement.metrics import gather_rows
from ..modeling_vqgan import VQGANModel

logger = logging.getLogger(__name__)


class LatentSamples(Dataset):
    """
    Rows of an image dataset, or of one that `encode_dataset.py` made, as `{"number", "label", KIND}` with KIND one of
    `latents` `(D, h, w)`, `indices` `(h, w[, n])` and `pixel_values` `(3, H, W)`.

    Sample numbers count on across epochs, as in `TrainingImages`; the label is 0 without `class_column`.

    Args:
        transform (`ImageTransform`): From an image to `pixel_values`; not used where there are latents or indices.
        dataset_name (`str`): For error messages.
        image_column (`str`, *optional*): Column with the images. Default: the only one.
        class_column (`str`, *optional*): Column with class numbers; `classes` then names them.
        preferred (`tuple[str, ...]`): Encoded columns to take instead of images, the first that is there.

    Raises:
        ValueError: if there are neither images nor latents, or no such class column.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        transform: ImageTransform,
        dataset_name: str,
        image_column: str | None = None,
        class_column: str | None = None,
        seed: int = 0,
        preferred: tuple[str, ...] = ("latents", "indices"),
    ):
        self.kind = next((name for name in preferred if name in rows.column_names), "pixel_values")
        self.classes: dict[int, str] = {}
        self.labels: list[int] | None = None
        self.reported: set[str] = set()  # unreadable images
        if class_column is not None:
            self.labels, self.classes = _read_classes(rows, class_column)
        # Whether a row is the same in every epoch.
        self.fixed = self.kind != "pixel_values" or (transform.center_crop and not transform.random_flip)
        if self.kind == "pixel_values":
            column = find_image_column(rows, dataset_name, image_column)
            images = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
            self.items = TrainingImages(images.rename_columns({column: "image"}), transform, seed)
        else:
            self.items = rows.select_columns([self.kind]).with_format("torch")

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> dict[str, Tensor | int]:
        row = number % len(self)
        # TrainingImages counts epochs itself, and puts the next readable image in an unreadable one's place.
        item = self.items[number if self.kind == "pixel_values" else row]
        row = item.get("row", row)
        for name, reason in item.get("skipped", {}).items():
            if name not in self.reported:
                logger.warning("skipped an unreadable image: %s", reason)
                self.reported.add(name)
        label = self.labels[row] if self.labels is not None else 0
        return {"number": number, "label": label, self.kind: item[self.kind]}


class EncodedSamples(Dataset):
    """`LatentSamples` in memory: `latents` `(N, D, h, w)`, as `encode` gives them, and `labels` `(N,)`."""

    def __init__(self, latents: Tensor, labels: Tensor):
        self.latents, self.labels = latents, labels

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, number: int) -> dict[str, Tensor | int]:
        row = number % len(self)
        return {"number": number, "label": self.labels[row], "latents": self.latents[row]}


def encode_samples(
    samples: LatentSamples, vqgan: VQGANModel, accelerator: Accelerator, batch_size: int, num_workers: int = 0
) -> EncodedSamples:
    """All of `samples`, which must be `fixed`, encoded once: the processes share the work, each gets the result."""
    # Every process the same number of rows, if need be by starting over.
    count = math.ceil(len(samples) / accelerator.num_processes)
    mine = [(n * accelerator.num_processes + accelerator.process_index) % len(samples) for n in range(count)]
    loader = DataLoader(Subset(samples, mine), batch_size=batch_size, num_workers=num_workers)
    latents, labels = [], []
    for batch in tqdm(loader, desc="encode", unit=" batches", disable=not accelerator.is_main_process):
        latents.append(raw_latents(vqgan, send_to_device(batch, accelerator.device)))
        labels.append(batch["label"].to(accelerator.device))
    whole = []
    for parts in (latents, labels):
        by_process = gather_rows(torch.cat(parts)).unflatten(0, (accelerator.num_processes, count))
        whole.append(by_process.transpose(0, 1).flatten(0, 1)[: len(samples)].cpu())
    return EncodedSamples(*whole)


@torch.no_grad()
def raw_latents(vqgan: VQGANModel, batch: dict[str, Tensor]) -> Tensor:
    """The batch's latents as `encode` gives them, `(B, D, h, w)`, float32, whichever of the three forms it has."""
    if "pixel_values" in batch:
        latents = vqgan.encode(batch["pixel_values"]).latents
    elif "indices" in batch:
        latents = vqgan.quantize.codes(batch["indices"].long())
    else:
        latents = batch["latents"]
    return latents.float()


def _read_classes(rows: datasets.Dataset, column: str) -> tuple[list[int], dict[int, str]]:
    """Class number of every row, and the names of all classes."""
    if column not in rows.column_names:
        raise ValueError(f"class_column={column!r} is not a column; columns: {', '.join(rows.column_names)}.")
    labels, feature = rows[column][:], rows.features[column]
    if not all(isinstance(label, int) and label >= 0 for label in labels):
        raise ValueError(f"class_column={column!r} is {feature}: expected class numbers from 0, none missing.")
    names = feature.names if isinstance(feature, datasets.ClassLabel) else [str(n) for n in range(max(labels) + 1)]
    return labels, dict(enumerate(names))
