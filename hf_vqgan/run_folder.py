"""A run's output folder: which run it holds, its log, reports, pictures and checkpoints."""

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
from dataclasses import Field, asdict
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from PIL import Image
from safetensors import SafetensorError

from .configuration_vqgan import VQGANConfig, model_fields
from .image_processing_vqgan import VQGANImageProcessor
from .modeling_vqgan import VQGANModel

logger = logging.getLogger(__name__)

CONFIG_FILE = "training_config.yaml"
LOG_FILE = "log.jsonl"
MANIFEST_FILE = "manifest.json"


# Where a run writes to and how it is watched does not make it another run; and a token belongs into no file.
NOT_IDENTITY = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "cpu_threads",
                "dataloader_num_workers", "report_to", "push_to_hub", "hub_model_id", "hub_token", "hub_private_repo",
                "hub_license")  # fmt: skip


class RunSettings(Protocol):
    """What a run's folder asks of the dataclass with the run's settings."""

    __dataclass_fields__: ClassVar[dict[str, Field]]
    output_dir: str
    overwrite_output_dir: bool
    resume_from_checkpoint: str | None
    resolution: int | None
    checkpoints_total_limit: int | None


def public_settings(config: RunSettings) -> dict:
    """The settings that make a run what it is."""
    return {name: value for name, value in asdict(config).items() if name not in NOT_IDENTITY}


class RunFolder:
    """The output folder of one run. Files appear in it whole or not at all."""

    def __init__(self, config: RunSettings, model_config: VQGANConfig | None, accelerator: Accelerator):
        self.config, self.accelerator = config, accelerator
        self.folder = Path(config.output_dir)
        self.identity = public_settings(config)
        if model_config is not None:
            self.identity |= {name: getattr(model_config, name) for name in model_fields()}

    def open(self) -> Path | None:
        """
        Claim the folder for this run, and return the checkpoint to resume from, if any.

        Raises:
            FileExistsError: if the folder holds a run with other settings; it names them.
            FileNotFoundError: if `resume_from_checkpoint` names nothing.
        """
        config, main = self.config, self.accelerator.is_main_process
        if config.overwrite_output_dir and main and not config.resume_from_checkpoint:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        settings = self.folder / CONFIG_FILE
        if settings.is_file():
            there, here = yaml.safe_load(settings.read_text()), yaml.safe_load(self._identity_yaml())
            differing = [key for key in here.keys() | there.keys() if here.get(key) != there.get(key)]
            if differing and not config.resume_from_checkpoint:
                raise FileExistsError(
                    f"{self.folder} holds another run; it differs in: {', '.join(sorted(differing))}. Choose another "
                    "--output_dir, or replace that run with --overwrite_output_dir."
                )
        elif any(self.folder.glob("checkpoint-*")) or (self.folder / "config.json").exists():
            raise FileExistsError(
                f"{self.folder} holds a model or checkpoints, but no {CONFIG_FILE} that says of which run. Choose "
                "another --output_dir, or replace them with --overwrite_output_dir."
            )
        checkpoint = self._find_checkpoint()
        if main:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(settings, self._identity_yaml())
        self.accelerator.wait_for_everyone()
        return checkpoint

    def _identity_yaml(self) -> str:
        lists = {name: list(value) if isinstance(value, tuple) else value for name, value in self.identity.items()}
        return yaml.safe_dump(lists, sort_keys=False)

    def _latest_whole(self) -> Path | None:
        for checkpoint in reversed(self.checkpoints()):
            if (damage := find_damage(checkpoint)) is None:
                return checkpoint
            logger.warning("%s is damaged (%s); looking for an earlier one.", checkpoint, damage)
        return None

    def checkpoints(self) -> list[Path]:
        """Checkpoint folders, oldest first."""
        found = [path for path in self.folder.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
        return sorted(found, key=lambda path: int(path.name.split("-")[1]))

    def _find_checkpoint(self) -> Path | None:
        """The checkpoint that was asked for, or the latest one that is whole; the main process looks, for all."""
        asked = self.config.resume_from_checkpoint
        if asked in (None, "latest"):
            found = [self._latest_whole() if self.accelerator.is_main_process else None]
            broadcast_object_list(found)
            if asked and found[0] is None:
                raise FileNotFoundError(f"--resume_from_checkpoint latest: no whole checkpoint-N in {self.folder}.")
            return found[0]
        if not Path(asked).is_dir():
            raise FileNotFoundError(f"--resume_from_checkpoint {asked}: no such folder.")
        if damage := find_damage(Path(asked)):
            raise ValueError(f"--resume_from_checkpoint {asked}: the checkpoint is damaged: {damage}.")
        return Path(asked)

    def save_checkpoint(
        self, model: VQGANModel, step: int, saved_weights: contextlib.AbstractContextManager | None = None
    ) -> None:
        """
        checkpoint-N, whole or not at all, and the model beside it; then drop checkpoints past the limit.

        Args:
            saved_weights (context manager, *optional*): Gives the model the weights to save beside the checkpoint.

        Raises:
            OSError: if it could not be written, say for a full disk. Earlier checkpoints are as they were.
        """
        temporary = self.folder / f".checkpoint-{step}.tmp"
        unfinished = self.folder / ".model.tmp"
        try:
            self._remove_leftovers()
            self.accelerator.save_state(str(temporary))
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                write_manifest(temporary)
                with saved_weights or contextlib.nullcontext():
                    self._save_model(model, unfinished)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch.save raises RuntimeError
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(unfinished, ignore_errors=True)
            free = shutil.disk_usage(self.folder).free / 2**20
            kept = ", ".join(path.name for path in self.checkpoints()) or "none yet"
            raise OSError(
                f"the checkpoint of step {step} could not be written to {self.folder} ({free:,.0f} MiB free there): "
                f"{error}. Earlier checkpoints are untouched: {kept}. Make room and run the same command again."
            ) from error
        if self.accelerator.is_main_process:
            # The checkpoint last: once it is there, the same command takes the run, model included, for complete.
            for file in [path for path in unfinished.rglob("*") if path.is_file()]:
                (self.folder / file.relative_to(unfinished)).parent.mkdir(exist_ok=True)
                file.replace(self.folder / file.relative_to(unfinished))
            shutil.rmtree(unfinished)
            target = self.folder / f"checkpoint-{step}"
            shutil.rmtree(target, ignore_errors=True)  # a damaged one that was passed over
            temporary.rename(target)
            limit = self.config.checkpoints_total_limit
            for old in self.checkpoints()[:-limit] if limit else []:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _remove_leftovers(self) -> None:
        """What a process that was killed while saving has left."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            for leftover in (*self.folder.glob(".checkpoint-*.tmp"), self.folder / ".model.tmp"):
                shutil.rmtree(leftover, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _save_model(self, model: VQGANModel, folder: Path) -> None:
        resolution = self.config.resolution
        processor = VQGANImageProcessor(
            size={"shortest_edge": resolution},
            crop_size={"height": resolution, "width": resolution},
            size_divisor=model.config.downsample_factor,
        )
        model.save_pretrained(folder)
        processor.save_pretrained(folder)

    def log(self, row: dict[str, float]) -> None:
        """Append to log.jsonl, but for figures that are not finite, which JSON cannot hold; and to the trackers."""
        if self.accelerator.is_main_process:
            finite = {name: value for name, value in row.items() if math.isfinite(value)}
            with open(self.folder / LOG_FILE, "a") as file:
                file.write(json.dumps(finite, allow_nan=False) + "\n")
        self.accelerator.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])

    def read_log(self) -> list[dict[str, float]]:
        """The rows of log.jsonl; a last line without its end, of a process killed while writing it, is not one."""
        file = self.folder / LOG_FILE
        lines = file.read_text().split("\n")[:-1] if file.is_file() else []
        return [json.loads(line) for line in lines]

    def truncate_log(self, step: int) -> None:
        """Forget what an interrupted run logged after the checkpoint that is now resumed."""
        if self.accelerator.is_main_process:
            rows = [row for row in self.read_log() if row["step"] <= step]
            write_text(self.folder / LOG_FILE, "".join(json.dumps(row) + "\n" for row in rows))

    def write_metrics(self, metrics: dict) -> None:
        if self.accelerator.is_main_process:
            write_text(self.folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")

    @property
    def has_metrics(self) -> bool:
        return (self.folder / "metrics.json").is_file()

    def read_metrics(self) -> dict:
        return json.loads((self.folder / "metrics.json").read_text())

    def save_picture(self, name: str, image: Image.Image, step: int) -> None:
        """Save a picture under its name, in place of the one before, and give it to the trackers that show pictures."""
        temporary = self.folder / f".{name}"
        image.save(temporary)
        temporary.replace(self.folder / name)
        pixels = np.asarray(image.convert("RGB"))[None]
        title = Path(name).stem.removesuffix(f"-{step}")
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({title: pixels}, step=step, **layout)


def write_manifest(folder: Path) -> None:
    """Note size and SHA-256 of all files of a folder in it, after they have reached the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {}
    for path in files:
        with open(path, "r+b") as file:  # Windows syncs only what may be written
            os.fsync(file.fileno())
        manifest[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    write_text(folder / MANIFEST_FILE, json.dumps(manifest, indent=2) + "\n")


def find_damage(folder: Path) -> str | None:
    """What differs from the folder's manifest, or `None` if it is whole."""
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text())
    except (OSError, ValueError) as error:
        return f"{MANIFEST_FILE} cannot be read ({error})"
    for name, expected in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size:,} bytes instead of {expected['bytes']:,}"
        if sha256(path) != expected["sha256"]:
            return f"{name} has other contents than were written"
    return None


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def write_text(file: Path, text: str) -> None:
    """Write a file, in UTF-8 on every system, so that it is there whole or not at all."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)
