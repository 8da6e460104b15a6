"""What the training loop asks of whatever it trains: a state that counts, a step, and what to show and keep."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from accelerate import Accelerator

from ..configuration_vqgan import VQGANConfig
from .checkpoint import Part
from .run_folder import RunFolder
from .setup import Batches


@dataclass
class RunState:
    """What a run consists of, and how far it is. Trainers add their networks."""

    config: Any  # with DatasetOptions, OptimizationOptions, RunOptions and HubOptions among its sections
    accelerator: Accelerator
    step: int = field(default=0, kw_only=True)  # optimizer steps done, skipped ones included
    nonfinite_steps: int = field(default=0, kw_only=True)  # of these, skipped
    nonfinite_in_a_row: int = field(default=0, kw_only=True)
    seconds: float = field(default=0.0, kw_only=True)  # of training, over all interruptions
    unreadable: int = field(default=0, kw_only=True)  # samples whose own image could not be read, over all epochs
    unreadable_images: dict[str, None] = field(default_factory=dict, kw_only=True)  # their names, each once
    upscaled: int = field(default=0, kw_only=True)  # samples from images that had to be enlarged

    COUNTERS: ClassVar[tuple[str, ...]] = (
        "step",
        "nonfinite_steps",
        "nonfinite_in_a_row",
        "seconds",
        "unreadable",
        "unreadable_images",
        "upscaled",
    )

    @property
    def global_batch(self) -> int:
        """Samples per optimizer step, over micro-batches and processes."""
        config = self.config
        return config.train_batch_size * config.gradient_accumulation_steps * self.accelerator.num_processes

    def state_dict(self) -> dict:
        return {name: getattr(self, name) for name in self.COUNTERS}

    def load_state_dict(self, state: dict) -> None:
        for name in self.COUNTERS:
            if name in state:  # earlier versions counted less
                setattr(self, name, state[name])


@dataclass
class StepOutput:
    """
    What one optimizer step tells.

    Args:
        losses (`dict[str, float]`): Every term, unweighted, averaged over micro-batches and processes.
        grad_norm (`float`): Norm of the gradient before clipping.
        nonfinite (`tuple[str, ...]`): Losses and norms that are NaN or infinite. If any, no weight has changed.
    """

    losses: dict[str, float]
    grad_norm: float
    nonfinite: tuple[str, ...] = field(default=(), kw_only=True)


class Task(ABC):
    """
    Something that the loop trains. All processes call every method together unless it says otherwise.

    Args:
        state (`RunState`): Its counters are the run's.
        name (`str`): Of the project at trackers.
        model_config ([`VQGANConfig`], *optional*): Settings beside `state.config` by which the run is recognized.
        model_files (`tuple[str, ...]`): Patterns of files without which a complete run has lost its model.
        shown (`tuple[str, ...]`): What of a log row stands beside the progress bar.
        unit (`str`): What a sample is: its rate is logged as `UNIT_per_second`.
        push (function): As `push_run_to_hub`.
    """

    state: RunState
    name: ClassVar[str]
    model_config: VQGANConfig | None = None
    model_files: ClassVar[tuple[str, ...]]
    shown: ClassVar[tuple[str, ...]]
    unit: ClassVar[str] = "images"
    push: ClassVar[Callable[..., str]]

    @property
    def phase(self) -> str:
        """What the progress bar calls the coming step."""
        return "train"

    # --------------------------------------------------------------------------------------------------- before

    @abstractmethod
    def describe_plan(self) -> str:
        """What the run is going to do, one `name: text` per line."""

    def idle_settings(self) -> list[str]:
        """Settings that have no effect in this run, and why."""
        return []

    @abstractmethod
    def checkpoint_parts(self) -> dict[str, Part]:
        """What a checkpoint holds, by name, but for the random states."""

    def prepare(self) -> None:  # noqa: B027
        """What takes long, and a dry run does without; after a checkpoint is loaded, before the first batch."""

    # ---------------------------------------------------------------------------------------------------- steps

    @abstractmethod
    def batches(self, stop: int) -> Batches:
        """This process's micro-batches from the current step to step `stop`, on its device."""

    @abstractmethod
    def take_step(self, micro_batches: list[dict[str, Any]], run: RunFolder) -> StepOutput:
        """One optimizer step with all that belongs to it; advances `state.step`. Changes no weight if not finite."""

    @abstractmethod
    def rehearse_step(self, micro_batches: list[dict[str, Any]]) -> StepOutput:
        """A step with everything on that would start later. The state is not to be used for training afterwards."""

    @abstractmethod
    def rehearse_evaluation(self) -> str:
        """Once through what `report` does, without writing. Returns what that was, as in "a validation image"."""

    # --------------------------------------------------------------------------------------------------- between

    @abstractmethod
    def log_row(self, output: Any) -> dict[str, float]:
        """What log.jsonl says of this step beside step number, losses and speed."""

    def check_health(self) -> None:  # noqa: B027, since most have nothing to check
        """Warn of, or stop for, what goes wrong; after every log row."""

    @abstractmethod
    def report(self, run: RunFolder, output: Any, last: bool) -> str | None:
        """
        Metrics and pictures, if they are due at this step.

        Args:
            last (`bool`): Whether the run ends here; metrics.json has to be there then.

        Returns:
            A line to print, if there is news.
        """

    @abstractmethod
    def save_model(self, folder: Path) -> None:
        """What others load, into a new folder. The main process alone calls this."""


def due(step: int, interval: int) -> bool:
    """Whether something that happens every `interval` steps (0: never) happens after this one."""
    return interval > 0 and step % interval == 0
