"""A run's output folder: which run it holds, its log, reports, pictures and checkpoints."""

import errno
import fnmatch
import hashlib
import inspect
import json
import logging
import math
import os
import re
import shutil
import socket
import stat
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from PIL import Image
from safetensors import SafetensorError

from ..configuration_vqgan import VQGANConfig, model_fields
from ..files.documents import read_mapping, read_settings, write_text
from ..files.options import default_of, role_of
from ..modeling_vqgan import VQGANModel
from .checkpoint import (
    STATE_FILE,
    Part,
    collect_states,
    read_accelerate_states,
    read_states,
    restore_states,
    write_states,
)
from .configuration import RunOptions

logger = logging.getLogger(__name__)

CONFIG_FILE = "training_config.yaml"
LOG_FILE = "log.jsonl"
METRICS_FILE = "metrics.json"
MANIFEST_FILE = "manifest.json"
LOCK_FILE = ".lock"
REPLACED = ".replaced"  # a subfolder: what is in it is being deleted
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)  # what file systems without locks answer
NAMED_SETTINGS = 10  # of those in which runs differ
MODEL_SOURCES = ("vqgan", "init_from", "alignment_model")  # settings that may name a folder with a model
LOCK_PATIENCE = 10.0  # seconds in which the data loaders of a process that was killed have ended

# What runs, trackers and evaluations write at the top of a run's folder: what --overwrite_output_dir may delete.
WRITTEN = (
    CONFIG_FILE, LOG_FILE, METRICS_FILE, "evaluation.json", "README.md", "checkpoint-*", LOCK_FILE, REPLACED, ".*.tmp",
    *(f"{hidden}{name}.png" for hidden in ("", ".")
      for name in ("reconstructions", "curves", "gradients", "codebook", "samples-*")),
    "config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json",
    "preprocessor_config.json", "model_index.json", "vqvae", "denoiser", "scheduler", "token_model",
    *(file.name for file in Path(inspect.getfile(VQGANModel)).parent.glob("*.py")),  # code that travels with a model
    "vqgan", "vqgan_latent_diffusion", "vqgan_tokens", "wandb",
)  # fmt: skip


Self = TypeVar("Self", bound="RunFolder")  # typing's own comes with Python 3.11


def public_settings(config: RunOptions) -> dict:
    """The settings that a run's files name: not where on this machine it is, and no secret."""
    roles = {field.name: role_of(field) for field in fields(config)}
    return {name: value for name, value in asdict(config).items() if roles[name] in ("result", "watching")}


class RunFolder:
    """
    The output folder of one run, which no other process has meanwhile: a context that ends when the run does. Files
    appear in the folder whole or not at all.
    """

    def __init__(self, config: RunOptions, model_config: VQGANConfig | None, accelerator: Accelerator):
        self.config, self.accelerator = config, accelerator
        self.folder = Path(config.output_dir)
        self.settings = public_settings(config)
        known = fields(config)
        self.identity = {field.name for field in known if role_of(field) == "result"}
        self.defaults = {field.name: default_of(field) for field in known}
        if model_config is not None:
            self.settings |= {name: getattr(model_config, name) for name in model_fields()}
            self.identity |= set(model_fields())
            self.defaults |= {name: getattr(VQGANConfig(), name) for name in model_fields()}
        self.lock = FileLock(self.folder / LOCK_FILE, timeout=LOCK_PATIENCE, fallback_to_soft=False)

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        self.lock.release()

    # -------------------------------------------------------------------------------------------------- claiming

    def open(self) -> Path | None:
        """
        Claim the folder for this run, and return the checkpoint to resume from, if any.

        A run with the same settings goes on, with `overwrite_output_dir` as well: a job that is started again must not
        delete its own checkpoints. A run with other settings is refused, or with `overwrite_output_dir` deleted, unless
        `resume_from_checkpoint` asks to go on with it.

        Raises:
            FileExistsError: if the folder holds a run with other settings (it names them) or, where it is to be
                deleted, other things than a run, or a model that this run needs; or if another process is at work in
                it.
            FileNotFoundError: if `resume_from_checkpoint` names nothing.
            ValueError: if the checkpoint it names, or every one in the folder, is damaged, or training_config.yaml is.
        """
        return self._on_main(self._claim)

    def check(self) -> None:
        """Raise what `open` would, except for another process that is at work in the folder, and write nothing."""
        self._on_main(self._check)

    def _claim(self) -> Path | None:
        asked, given = self.config.resume_from_checkpoint, self._given_checkpoint()
        self._refuse_what_is_no_run()
        self._acquire_lock()
        if (self.folder / REPLACED).is_dir():  # a process that was killed meanwhile has left the rest to us
            self._delete_run()
        differing, goes_on = self._compare(given)
        if differing and goes_on:
            print(f"Going on with the run in {self.folder} in spite of other settings: {', '.join(differing)}.")
        elif differing:
            self._delete_run()
        checkpoint = given or self._latest_whole()
        if asked == "latest" and checkpoint is None:
            print(f"--resume_from_checkpoint latest: no checkpoint in {self.folder} yet, so this is a new run.")
        if checkpoint is None:  # else once it is loaded: one that does not fit leaves the run that is there as it was
            self._write_settings()
        return checkpoint

    def _check(self) -> None:
        given = self._given_checkpoint()
        self._refuse_what_is_no_run()
        if (self.folder / REPLACED).is_dir():  # the rest of a run whose deletion was interrupted: no run
            return
        differing, goes_on = self._compare(given)
        if given is None and (goes_on or not differing):
            self._latest_whole()

    def _given_checkpoint(self) -> Path | None:
        """The checkpoint folder that `resume_from_checkpoint` names, if it names one, whole."""
        asked = self.config.resume_from_checkpoint
        if asked in (None, "latest"):
            return None
        _check_checkpoint(Path(asked))
        return Path(asked)

    def _compare(self, given: Path | None) -> tuple[list[str], bool]:
        """
        The settings in which the run in the folder differs, and whether this one is to go on with it all the same. If
        not, it is to be deleted.

        Raises:
            FileExistsError: if it may not be deleted.
        """
        in_folder = given is not None and given.resolve().parent == self.folder.resolve()
        goes_on = self.config.resume_from_checkpoint == "latest" or in_folder
        differing = self._find_differing(forgiving=goes_on)
        if differing and not goes_on:
            if not self.config.overwrite_output_dir:
                more = f" and {len(differing) - NAMED_SETTINGS} more" if len(differing) > NAMED_SETTINGS else ""
                raise FileExistsError(
                    f"{self.folder} holds another run; it differs in: {', '.join(differing[:NAMED_SETTINGS])}{more}. "
                    "Choose another --output_dir, or replace that run with --overwrite_output_dir."
                )
            self._refuse_to_delete_sources()
        return differing, goes_on

    def _refuse_to_delete_sources(self) -> None:
        """
        Raises:
            FileExistsError: if a model that this run starts from is part of the run that is to be deleted.
        """
        folder = self.folder.resolve()
        for name in MODEL_SOURCES:
            source = getattr(self.config, name, None)
            path = Path(source).resolve() if source else None
            if path is None or not path.is_relative_to(folder):
                continue
            if path == folder or _is_written(path.relative_to(folder).parts[0]):
                raise FileExistsError(
                    f"--overwrite_output_dir would delete --{name} {source}, which this run needs. Choose another "
                    "--output_dir."
                )

    def _refuse_what_is_no_run(self) -> None:
        """
        Raises:
            FileExistsError: if `output_dir` is a file, or is to be overwritten and holds anything but a run.
        """
        nearest = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        if not nearest.is_dir():
            what = "is a file" if nearest == self.folder else f"cannot be made: {nearest} is a file"
            raise FileExistsError(f"--output_dir {self.folder} {what}. Choose another name.")
        names = sorted(path.name for path in self.folder.iterdir()) if self.folder.is_dir() else []
        shown = [name for name in names if not name.startswith(".")]
        is_run = CONFIG_FILE in names or any((path / MANIFEST_FILE).is_file() for path in self.checkpoints())
        if self.config.overwrite_output_dir and shown and not is_run:
            listed = ", ".join(shown[:3]) + (", ..." if len(shown) > 3 else "")
            raise FileExistsError(
                f"{self.folder} is not a run's folder: it holds {listed}. --overwrite_output_dir deletes runs and "
                "nothing else: choose another --output_dir, or empty this one yourself."
            )

    def _acquire_lock(self) -> None:
        """
        Raises:
            FileExistsError: if another process has the folder. The system takes the lock from a process that ends.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / LOCK_FILE
        try:
            self.lock.acquire()
        except Timeout:
            holder = file.read_text(encoding="utf-8", errors="replace")[:200] or "another process"
            raise FileExistsError(
                f"{self.folder} is in use by a run that has not ended: {holder}. Wait for it or end it, or choose "
                "another --output_dir."
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            logger.warning("The file system of %s has no locks: see to it that one run at a time uses it.", self.folder)
            return
        file.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")

    def _find_differing(self, forgiving: bool) -> list[str]:
        """
        The settings of the run in the folder that make it another one than this.

        What that run, by an older version, does not name was at its default.

        Raises:
            ValueError: if they cannot be read; if `forgiving`, that is a warning, and training_config.yaml differs.
        """
        file = self.folder / CONFIG_FILE
        if not file.exists() and not any(self.checkpoints()) and not (self.folder / "config.json").exists():
            return []
        try:
            there = read_settings(file)
        except ValueError as error:
            if forgiving:
                logger.warning("%s", error)
                return [CONFIG_FILE]
            raise ValueError(
                f"{error} If {self.folder} holds the run of this command, go on with it by --resume_from_checkpoint "
                "latest; else choose another --output_dir, or delete that folder yourself."
            ) from error
        here = yaml.safe_load(self._settings_yaml())
        return sorted(
            {name for name in self.identity if here[name] != there.get(name, self.defaults[name])}
            | {str(name) for name in there.keys() - self.defaults.keys()}
        )

    def _delete_run(self) -> None:
        """
        All of the run, and only what runs write; if interrupted, the rest of it as soon as the folder is claimed again.
        """
        replaced = self.folder / REPLACED
        replaced.mkdir(exist_ok=True)
        for path in list(self.folder.iterdir()):
            if _is_written(path.name) and path.name not in (REPLACED, LOCK_FILE):
                path.rename(replaced / path.name)
        shutil.rmtree(replaced)

    def _write_settings(self) -> None:
        write_text(self.folder / CONFIG_FILE, self._settings_yaml())

    def _settings_yaml(self) -> str:
        lists = {name: list(value) if isinstance(value, tuple) else value for name, value in self.settings.items()}
        return yaml.safe_dump(lists, sort_keys=False)

    def _latest_whole(self) -> Path | None:
        """
        Raises:
            ValueError: if there are checkpoints, all of them damaged.
        """
        checkpoints = self.checkpoints()
        for checkpoint in reversed(checkpoints):
            if (damage := find_damage(checkpoint)) is None:
                return checkpoint
            logger.warning("%s is damaged (%s); looking for an earlier one.", checkpoint, damage)
        if checkpoints:
            raise ValueError(
                f"every checkpoint in {self.folder} is damaged, {checkpoints[-1].name} because {damage}. Restore one, "
                "or delete them all to start anew."
            )
        return None

    def _on_main(self, work: Callable[[], Any]) -> Any:
        """What `work` returns or raises in the main process, on all of them."""
        outcome: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            try:
                outcome[0] = work()
            except (OSError, ValueError) as error:
                outcome[1] = error
        broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    # -------------------------------------------------------------------------------------------------- checkpoints

    def checkpoints(self) -> list[Path]:
        """Checkpoint folders, oldest first."""
        found = [path for path in self.folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d{1,15}", path.name)]
        return sorted(found, key=lambda path: int(path.name.split("-")[1]))

    def save_checkpoint(self, step: int, parts: dict[str, Part], save_model: Callable[[Path], None]) -> None:
        """
        checkpoint-N, whole or not at all, and the model beside it; then drop checkpoints past the limit.

        Args:
            parts (`dict[str, Part]`): What the checkpoint holds the states of.
            save_model (function): Saves the model that goes beside the checkpoint into a folder, which is new.

        Raises:
            OSError: if it could not be written, say for a full disk. Earlier checkpoints are as they were.
        """
        states = collect_states(parts, self.accelerator)
        self._on_main(lambda: self._write_checkpoint(step, states, save_model))

    def _write_checkpoint(self, step: int, states: dict[str, dict], save_model: Callable[[Path], None]) -> None:
        temporary, unfinished = self.folder / f".checkpoint-{step}.tmp", self.folder / ".model.tmp"
        for leftover in (*self.folder.glob(".checkpoint-*.tmp"), unfinished):  # of a process killed while saving
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            temporary.mkdir()
            write_states(temporary, states)
            save_model(unfinished)
            for folder in (temporary, unfinished):
                give_usual_mode(folder)
            write_manifest(temporary)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(unfinished, ignore_errors=True)
            free = shutil.disk_usage(self.folder).free / 2**20
            kept = ", ".join(path.name for path in self.checkpoints()) or "none yet"
            raise OSError(
                f"the checkpoint of step {step} could not be written to {self.folder} ({free:,.0f} MiB free there): "
                f"{error}. Earlier checkpoints are untouched: {kept}. Make room and run the same command again."
            ) from error
        # The checkpoint last: once it is there, the same command takes the run, model included, for complete.
        for file in [path for path in unfinished.rglob("*") if path.is_file()]:
            (self.folder / file.relative_to(unfinished)).parent.mkdir(exist_ok=True)
            file.replace(self.folder / file.relative_to(unfinished))
        shutil.rmtree(unfinished)
        target = self.folder / f"checkpoint-{step}"
        shutil.rmtree(target, ignore_errors=True)  # a damaged one that was passed over
        temporary.rename(target)
        if limit := self.config.checkpoints_total_limit:
            # Later ones are there when an earlier one was resumed; they are no reason to drop the new one.
            until_now = [path for path in self.checkpoints() if int(path.name.split("-")[1]) <= step]
            for old in until_now[:-limit]:
                shutil.rmtree(old)

    def load_checkpoint(self, checkpoint: Path, parts: dict[str, Part]) -> None:
        """
        Put `parts` and the random generators into the states that a checkpoint of this run holds; from then on, the
        folder is this run's.

        Raises:
            ValueError: if it does not hold them.
        """
        try:
            new = (checkpoint / STATE_FILE).exists()
            states = read_states(checkpoint) if new else read_accelerate_states(checkpoint, parts)
            restore_states(parts, states, self.accelerator)
        except ValueError as error:
            raise ValueError(f"cannot resume from {checkpoint}: {error}") from error
        self._on_main(self._write_settings)

    def log(self, row: dict[str, float]) -> None:
        """Append to log.jsonl, but for figures that are not finite, which JSON cannot hold; and to the trackers."""
        if self.accelerator.is_main_process:
            finite = {name: value for name, value in row.items() if math.isfinite(value)}
            with open(self.folder / LOG_FILE, "a", encoding="utf-8") as file:
                file.write(json.dumps(finite, allow_nan=False) + "\n")
        self.accelerator.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])

    def read_log(self) -> list[dict[str, float]]:
        """
        The rows of log.jsonl. A last line without its end, of a process killed while writing it, is not one; other
        lines that are none, say after a power failure, are left out with a warning.
        """
        file = self.folder / LOG_FILE
        lines = file.read_bytes().split(b"\n")[:-1] if file.is_file() else []
        rows = [row for row in map(_parse_log_line, lines) if row is not None]
        if len(rows) < len(lines):
            logger.warning("%s: %d damaged lines of %d are left out.", file, len(lines) - len(rows), len(lines))
        return rows

    def truncate_log(self, step: int) -> None:
        """Forget what an interrupted run logged after the checkpoint that is now resumed."""
        if self.accelerator.is_main_process:
            rows = [row for row in self.read_log() if row["step"] <= step]
            write_text(self.folder / LOG_FILE, "".join(json.dumps(row) + "\n" for row in rows))

    def write_metrics(self, metrics: dict) -> None:
        """metrics.json, without numbers that are not finite, as in log.jsonl: say, the loss of a last step skipped."""
        if self.accelerator.is_main_process:
            known = {
                name: value for name, value in metrics.items() if not isinstance(value, float) or math.isfinite(value)
            }
            write_text(self.folder / METRICS_FILE, json.dumps(known, indent=2, allow_nan=False) + "\n")

    @property
    def has_metrics(self) -> bool:
        return (self.folder / METRICS_FILE).is_file()

    def require_model(self, patterns: tuple[str, ...]) -> None:
        """
        Raises:
            ValueError: if files of the complete run's model are missing, with the way to get them back.
        """
        for pattern in patterns:
            if not any(self.folder.glob(pattern)):
                raise ValueError(
                    f"the run is complete, but {self.folder / pattern.replace('*', '')} is missing. To get it back, "
                    "delete the run's last checkpoint and run the same command: it goes on from the one before."
                )

    def read_metrics(self) -> dict:
        """
        Raises:
            ValueError: if metrics.json is missing or damaged, with the way to have it again.
        """
        return self._on_main(self._read_metrics)

    def _read_metrics(self) -> dict:
        try:
            return read_mapping(self.folder / METRICS_FILE)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"the run is complete, but {error} To measure again, delete its last checkpoint in {self.folder} and "
                "run the same command: it goes on from the one before."
            ) from error

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


def _is_written(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in WRITTEN)


def _check_checkpoint(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"--resume_from_checkpoint {folder}: no such folder.")
    if damage := find_damage(folder):
        raise ValueError(f"--resume_from_checkpoint {folder}: the checkpoint is damaged: {damage}.")


def _parse_log_line(line: bytes) -> dict[str, float] | None:
    try:
        row = json.loads(line)
        is_row = "step" in row and all(type(value) in (int, float) and math.isfinite(value) for value in row.values())
        return row if is_row else None
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return None


def give_usual_mode(folder: Path) -> None:
    """Give all files the permissions of any new file: safetensors lets nobody but their owner read them."""
    probe = folder / ".mode"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and stat.S_IMODE(path.stat().st_mode) != mode:
            path.chmod(mode)


def write_manifest(folder: Path) -> None:
    """Note size and SHA-256 of all files of a folder in it, after they have reached the disk."""
    manifest = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with open(path, "r+b") as file:  # Windows syncs only what may be written
            os.fsync(file.fileno())
        name = path.relative_to(folder).as_posix()
        manifest[name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    write_text(folder / MANIFEST_FILE, json.dumps(manifest, indent=2) + "\n")


def find_damage(folder: Path) -> str | None:
    """What differs from the folder's manifest, or `None` if it is whole."""
    try:
        manifest = read_mapping(folder / MANIFEST_FILE)
        expected = {name: (row["bytes"], row["sha256"]) for name, row in manifest.items()}
    except (OSError, ValueError, LookupError, TypeError) as error:
        return f"{MANIFEST_FILE} cannot be read ({error})"
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {MANIFEST_FILE}
    if missing := sorted(expected.keys() - there):
        return f"{missing[0]} is missing"
    if unknown := sorted(there - expected.keys()):
        return f"{unknown[0]} is not in {MANIFEST_FILE}"
    for name, (size, checksum) in expected.items():
        path = folder / name
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes instead of {size}"
        if sha256(path) != checksum:
            return f"{name} has other contents than were written"
    return None


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
