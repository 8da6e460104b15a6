"""Rows of a dataset, of images or of what `hf-vqgan encode` made of them, as latents or indices to learn."""

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from ..data.datasets import ImageTransform, TrainingImages, collate_samples, shuffled_epochs, take_batches
from ..data.images import only_image_column, read_classes
from ..measurement.metrics import gather_rows
from ..modeling_vqgan import VQGANModel

logger = logging.getLogger(__name__)

# What samples say of the images behind them, where these could be read.
READ_WITHOUT_TROUBLE: dict[str, Any] = {"unreadable": 0, "upscaled": 0, "skipped": {}}


class LatentSamples(Dataset):
    """
    Rows of an image dataset, or of one that `hf-vqgan encode` made, as `{"number", "label", KIND, "unreadable",
    "upscaled", "skipped"}` with KIND one of `latents` `(D, h, w)`, `indices` `(h, w[, n])` and `pixel_values`
    `(3, H, W)`, the last three as in `TrainingImages`.

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
        self.seed = seed
        self.kind = next((name for name in preferred if name in rows.column_names), "pixel_values")
        self.classes: dict[int, str] = {}
        self.labels: list[int] | None = None
        if class_column is not None:
            self.labels, self.classes = read_classes(rows, class_column)
        # Whether a row is the same in every epoch.
        self.fixed = self.kind != "pixel_values" or (transform.center_crop and not transform.random_flip)
        if self.kind == "pixel_values":
            self.items = TrainingImages(only_image_column(rows, dataset_name, image_column), transform, seed)
        else:
            self.items = rows.select_columns([self.kind]).with_format("torch")
            self.dataset_name = dataset_name
            self.shape = getattr(self.items[0][self.kind], "shape", None)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> dict[str, Any]:
        row = number % len(self)
        # TrainingImages counts epochs itself, and puts the next readable image in an unreadable one's place.
        item = self.items[number] if self.kind == "pixel_values" else self._encoded(row)
        row = item.get("row", row)
        label = self.labels[row] if self.labels is not None else 0
        found = {name: item.get(name, default) for name, default in READ_WITHOUT_TROUBLE.items()}
        return {"number": number, "label": label, self.kind: item[self.kind]} | found

    def _encoded(self, row: int) -> dict[str, Tensor]:
        item = self.items[row]
        shape = getattr(item[self.kind], "shape", None)  # of ragged lists, text and nothing: none
        dimensions = (3,) if self.kind == "latents" else (2, 3)
        if shape is None or shape != self.shape or len(shape) not in dimensions:
            found = "no numbers of one shape" if shape is None else f"shape {tuple(shape)}"
            expected = "(D, h, w)" if self.kind == "latents" else "(h, w) or (h, w, n)"
            raise ValueError(
                f"{self.dataset_name!r}: {self.kind} in row {row} have {found}; expected {expected}, the same in every "
                "row. Encode the dataset with `hf-vqgan encode`."
            )
        return item

    def batch_keys(
        self, batch_size: int, start: int = 0, stop: int | None = None, rank: int = 0, world_size: int = 1
    ) -> Iterator[list[int]]:
        """Keys of the batches that `load_batches` describes."""
        return take_batches(
            shuffled_epochs(len(self), self.seed, start * batch_size), batch_size, start, stop, rank, world_size
        )


class EncodedSamples(Dataset):
    """
    `LatentSamples` in memory.

    Args:
        form (`str`): `"latents"` or `"indices"`.
        encoded (`Tensor` of shape `(N, ...)`): All samples in that form.
        labels (`Tensor` of shape `(N,)`): Class numbers.
        seed (`int`): Of their order.
    """

    def __init__(self, form: str, encoded: Tensor, labels: Tensor, seed: int = 0):
        self.form, self.encoded, self.labels, self.seed = form, encoded, labels, seed
        self.fixed = False  # there is nothing left to encode

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, number: int) -> dict[str, Any]:
        row = number % len(self)
        sample = {"number": number, "label": self.labels[row], self.form: self.encoded[row]}
        return sample | READ_WITHOUT_TROUBLE

    batch_keys = LatentSamples.batch_keys


def encode_samples(
    samples: LatentSamples,
    encode: Callable[[dict[str, Any]], Tensor],
    form: str,
    accelerator: Accelerator,
    batch_size: int,
    num_workers: int = 0,
) -> EncodedSamples:
    """
    All of `samples`, which must be `fixed`, encoded once: the processes share the work, each gets the result.

    Unreadable images are named here, once and for all, and no longer counted by the steps that see their stand-ins.
    """
    # Every process the same number of rows, if need be by starting over.
    count = math.ceil(len(samples) / accelerator.num_processes)
    mine = [(n * accelerator.num_processes + accelerator.process_index) % len(samples) for n in range(count)]
    loader = DataLoader(
        Subset(samples, mine),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=collate_samples,
        generator=torch.Generator(),  # as in `load_batches`
    )
    encoded, labels = [], []
    reasons: dict[str, str] = {}
    for batch in tqdm(loader, desc="encode", unit=" batches", disable=not accelerator.is_main_process):
        reasons |= batch["skipped"]
        encoded.append(encode(send_to_device(batch, accelerator.device)))
        labels.append(batch["label"].to(accelerator.device))
    for reason in reasons.values():
        logger.warning("skipped an unreadable image: %s", reason)
    whole = []
    for parts in (encoded, labels):
        by_process = gather_rows(torch.cat(parts)).unflatten(0, (accelerator.num_processes, count))
        whole.append(by_process.transpose(0, 1).flatten(0, 1)[: len(samples)].cpu())
    return EncodedSamples(form, whole[0], whole[1], samples.seed)


@torch.no_grad()
def raw_latents(vqgan: VQGANModel, batch: dict[str, Tensor]) -> Tensor:
    """
    The batch's latents as `encode` gives them, `(B, D, h, w)`, float32, whichever of the three forms it has.

    Raises:
        ValueError: for indices that the VQ-GAN does not have.
    """
    if "pixel_values" in batch:
        latents = vqgan.encode(batch["pixel_values"]).latents
    elif "indices" in batch:
        latents = vqgan.quantize.codes(checked_indices(vqgan, batch["indices"]))
    else:
        latents = batch["latents"]
    return latents.float()


@torch.no_grad()
def raw_indices(vqgan: VQGANModel, batch: dict[str, Tensor]) -> Tensor:
    """
    The batch's indices `(B, h, w)` or `(B, h, w, n)`, int64, whichever of the three forms of `LatentSamples` it has.

    Raises:
        ValueError: for latents or indices that the VQ-GAN does not have.
    """
    if "pixel_values" in batch:
        return vqgan.encode_indices(batch["pixel_values"])
    if "latents" in batch:
        latents = batch["latents"].float()
        if latents.shape[1] != vqgan.config.vq_embed_dim:
            raise ValueError(
                f"latents of shape {tuple(latents.shape)}: this VQ-GAN has {vqgan.config.vq_embed_dim} channels. "
                "Encode the dataset with it."
            )
        return vqgan.quantize(latents).indices
    return checked_indices(vqgan, batch["indices"])


def checked_indices(vqgan: VQGANModel, indices: Tensor) -> Tensor:
    """The indices, int64. Raises ValueError for any that the VQ-GAN does not have."""
    indices = indices.long()
    codes, several = vqgan.quantize.num_codes, vqgan.quantize.num_codebooks
    expected = "(B, h, w)" if several == 1 else f"(B, h, w, {several})"
    if indices.shape[3:] != (() if several == 1 else (several,)) or indices.min() < 0 or indices.max() >= codes:
        raise ValueError(
            f"indices of shape {tuple(indices.shape)} in [{indices.min()}, {indices.max()}]: this VQ-GAN has indices "
            f"{expected} in [0, {codes - 1}]. Encode the dataset with it."
        )
    return indices
