"""An image dataset as a dataset of latents and codes: encoded once, in resumable shards, by any number of processes."""

import hashlib
import io
import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from tqdm.auto import tqdm

from ..data.images import CentralSquares, ImageOptions, check_splits, find_image_column, only_image_column
from ..files.documents import read_mapping, write_text
from ..files.options import check_values, option
from ..files.sources import check_model_folder
from ..modeling_vqgan import VQGANModel
from ..training.setup import share_cpu_threads

SETTINGS_FILE = "encoding.json"
WHAT = ("latents", "indices")


@dataclass
class EncodingConfig:
    """How a dataset is encoded. Every field is a flag of `hf-vqgan encode`."""

    what: list[str] = option(["latents", "indices"], "Columns to make.", choices=WHAT, nonempty=True)
    dataset_config_name: str | None = option(None, "Configuration of the dataset.")
    dataset_revision: str | None = option(None, "Branch, tag or commit of a Hub dataset.")
    splits: list[str] = option([], "Splits to encode. Default: all.")
    image_column: str | None = option(None, "Column with the images, which the result drops. Default: the only one.")
    cache_dir: str | None = option(None, "Where `datasets` keeps what it downloads.", role="place")
    resolution: int | None = option(
        None, "Side in pixels of the central square. Default: the model's sample_size.", at_least=1
    )
    resize: int | None = option(
        None, "Shorter side before cropping. Default: resolution. 0: keep the image's size.", at_least=0
    )
    latents_dtype: str = option("float32", "Type of the latents.", choices=("float32", "float16"))
    mixed_precision: str = option("no", "Autocast.", choices=("no", "bf16", "fp16"))
    batch_size: int = option(32, "Images per forward pass.", at_least=1)
    shard_size: int = option(1024, "Rows of the source per parquet file, the unit that is resumed.", at_least=1)
    cpu_threads: int | None = option(
        None, "Threads per process on CPU. Default: the cores shared evenly.", at_least=1, role="place"
    )
    push_to_hub: bool = option(False, "Share the result, when complete, as a dataset on the Hub.", role="place")
    hub_dataset_id: str | None = option(
        None, "Its repository, `user/name`. Default: the output folder's name.", role="place"
    )
    hub_private_repo: bool = option(False, "Make the repository private.", role="place")
    hub_token: str | None = option(None, "Token for the Hub. Default: the one that is logged in.", role="secret")

    def __post_init__(self):
        check_values(self)


def encode_dataset(model_name: str, dataset_name: str, out: str | Path, config: EncodingConfig) -> dict[str, float]:
    """
    Encode `dataset_name` with the model `model_name` into the folder `out`, which `datasets.load_dataset(out)` reads.

    The image column gives way to `latents` `(D, h, w)`, as `encode` gives them, not normalised, and `indices` `(h, w)`
    or `(h, w, n)`, int32; all other columns stay as they are. Unreadable images lose their row, with a warning.
    Shards are written whole or not at all, and those already there are kept: run the same command again to resume, on
    any number of processes.

    Returns:
        `images` encoded by this call, `seconds`, and `images_per_second`, over all processes.

    Raises:
        FileExistsError: if `out` holds a dataset encoded with other settings; it names them.
        ValueError, FileNotFoundError: for a model or dataset that is not there or does not fit.
        OSError: if a shard cannot be written, say for a full disk. Those already there are kept.
    """
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    share_cpu_threads(config, accelerator)
    out = Path(out)
    check_model_folder(model_name)
    model = VQGANModel.from_pretrained(model_name).eval().to(accelerator.device)
    side = model.config.sample_size if config.resolution is None else config.resolution
    if side % model.config.downsample_factor:
        raise ValueError(
            f"resolution={side} is not a multiple of {model.config.downsample_factor}, the model's downsampling factor."
        )
    options = ImageOptions.of(dataset_name, config, resolution=side)
    with accelerator.main_process_first():  # one process fills the dataset cache, the others read it
        splits = options.load_splits()
    check_splits(splits, dataset_name, *config.splits)
    splits = {name: splits[name] for name in config.splits or splits}
    for rows in splits.values():  # before the folder is claimed: the mended command has other settings
        find_image_column(rows, dataset_name, config.image_column)

    if accelerator.is_main_process:
        _claim(out, _settings(model, splits, options, config))
    accelerator.wait_for_everyone()
    shards = [shard for split, rows in splits.items() for shard in cut_into_shards(split, rows, config.shard_size)]
    mine = shards[accelerator.process_index :: accelerator.num_processes]
    todo = [shard for shard in mine if not shard.file(out).exists()]
    progress = tqdm(
        total=sum(len(shard.rows) for shard in todo),
        desc=f"encode ({len(mine) - len(todo)} of {len(mine)} shards are there)",
        unit=" images",
        disable=not accelerator.is_local_main_process,
    )
    started, images = time.perf_counter(), 0
    for shard in todo:
        with accelerator.autocast():
            encoded = _encode_shard(model, shard, options, config, progress)
        _write_shard(encoded, shard.file(out))
        images += len(encoded)
    progress.close()
    total = accelerator.reduce(torch.tensor(images, device=accelerator.device), "sum").item()
    seconds = time.perf_counter() - started
    found = {"images": total, "seconds": seconds, "images_per_second": total / seconds}
    accelerator.print(f"{out}: encoded {total} images in {seconds:.1f} s, {total / seconds:.1f} images/s.")
    if config.push_to_hub and accelerator.is_main_process:
        repository = config.hub_dataset_id or out.resolve().name
        datasets.load_dataset(str(out)).push_to_hub(repository, private=config.hub_private_repo, token=config.hub_token)
        print(f"Pushed to {repository}.")
    accelerator.wait_for_everyone()
    return found


def weights_sha256(module: nn.Module) -> str:
    """Checksum of a module's parameters and buffers with their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _settings(model: VQGANModel, splits: dict, options: ImageOptions, config: EncodingConfig) -> dict:
    """What the shards depend on. A model counts by its weights: its folder may hold others tomorrow."""
    names = ("what", "dataset_config_name", "dataset_revision", "image_column", "latents_dtype", "mixed_precision")
    return {name: value for name, value in asdict(config).items() if name in (*names, "shard_size")} | {
        "dataset": options.dataset_name,
        "rows": {name: len(rows) for name, rows in splits.items()},
        "model_sha256": weights_sha256(model),
        "resolution": options.resolution,
        "resize": options.transform().resize,
    }


def _claim(out: Path, settings: dict) -> None:
    file = out / SETTINGS_FILE
    if file.is_file():
        there = read_mapping(file)
        differing = [name for name in settings.keys() | there.keys() if settings.get(name) != there.get(name)]
        if differing:
            raise FileExistsError(
                f"{out} holds a dataset encoded with other settings: {', '.join(sorted(differing))}. Choose another "
                "folder, or delete this one."
            )
    elif out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty and has no {SETTINGS_FILE}. Choose another folder.")
    for leftover in out.glob("data/.*.tmp"):
        leftover.unlink()
    (out / "data").mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(settings, indent=2) + "\n")


@dataclass(frozen=True)
class Shard:
    """Shard `number` of the `count` of a split: its `rows`, of which the first is row `start` of the split."""

    split: str
    number: int
    count: int
    start: int
    rows: datasets.Dataset

    def file(self, out: Path) -> Path:
        return out / "data" / f"{self.split}-{self.number:05d}-of-{self.count:05d}.parquet"


def cut_into_shards(split: str, rows: datasets.Dataset, size: int) -> list[Shard]:
    starts = range(0, len(rows), size)
    return [
        Shard(split, number, len(starts), start, rows.select(range(start, min(start + size, len(rows)))))
        for number, start in enumerate(starts)
    ]


def _write_shard(encoded: datasets.Dataset, file: Path) -> None:
    buffer = io.BytesIO()  # a full disk would make pyarrow's own file abort the program
    encoded.to_parquet(buffer)
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        temporary.write_bytes(buffer.getbuffer())
    except OSError as error:
        temporary.unlink(missing_ok=True)
        free = shutil.disk_usage(file.parent).free / 2**20
        raise OSError(
            f"{file} could not be written ({free:,.0f} MiB free there): {error}. Make room and run the same command "
            "again: finished shards are kept."
        ) from error
    temporary.replace(file)


@torch.no_grad()
def _encode_shard(
    model: VQGANModel, shard: Shard, options: ImageOptions, config: EncodingConfig, progress: tqdm
) -> datasets.Dataset:
    """The shard's rows with codes and latents in place of the images."""
    column = find_image_column(shard.rows, options.dataset_name, options.image_column)
    images = only_image_column(shard.rows, options.dataset_name, column)
    readable: list[int] = []
    made: dict[str, list[np.ndarray]] = {name: [] for name in config.what}
    for batch in CentralSquares.of_rows(images, options.transform(), shard.start).batches(config.batch_size):
        readable += batch.rows
        latents = model.encode(batch.pixels.to(model.device)).latents
        if "latents" in made:
            made["latents"].append(latents.float().cpu().numpy().astype(config.latents_dtype))
        if "indices" in made:
            made["indices"].append(model.quantize(latents).indices.cpu().numpy().astype(np.int32))
        progress.update(len(batch.rows))
    if not readable:
        raise ValueError(f"not one of {len(shard.rows)} images in column {column!r} can be read.")
    progress.update(len(shard.rows) - len(readable))
    columns, features = {}, {}
    for name, arrays in made.items():
        columns[name] = np.concatenate(arrays)
        shape = columns[name].shape[1:]
        kind = datasets.Array2D if len(shape) == 2 else datasets.Array3D
        features[name] = kind(shape=shape, dtype="int32" if name == "indices" else config.latents_dtype)
    encoded = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    kept = shard.rows.remove_columns(column)
    if not kept.column_names:
        return encoded
    # Joined as Arrow tables: other columns, images among them, are not decoded.
    return datasets.concatenate_datasets([kept.select(readable), encoded], axis=1)
