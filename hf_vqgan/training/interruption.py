"""What ends a run early: notices from outside, a codebook that collapses, losses that are not finite."""

import contextlib
import logging
import os
import signal
import threading
import time

import torch
from accelerate import Accelerator

from ..data.datasets import notices
from .task import RunState, StepOutput

logger = logging.getLogger(__name__)

PREEMPTED_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again
INTERRUPTED_EXIT_CODE = 128 + signal.SIGINT  # what shells report of a program that Ctrl-C has ended


class Preempted(RuntimeError):
    """
    The run was asked to stop. It has saved a checkpoint; the same command goes on from there.

    Args:
        exit_code (`int`): What a program that ends with this should return.
    """

    def __init__(self, message: str, exit_code: int = PREEMPTED_EXIT_CODE):
        super().__init__(message)
        self.exit_code = exit_code


class CodebookCollapse(RuntimeError):
    """The codebook has collapsed, and the run was told to stop then."""


class PreemptionNotice(contextlib.AbstractContextManager):
    """
    Takes as a request to save and stop: SIGTERM and SIGUSR1, with which clusters announce that they will end a job, and
    Ctrl-C. A second Ctrl-C stops at once.

    Args:
        accelerator (`Accelerator`): A notice to one process is one to all.
    """

    SAME_KEY = 1.0  # seconds: terminals and launchers may both pass one Ctrl-C on

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.name: str | None = None  # of the first signal that this process got
        self.interrupted: float | None = None  # when Ctrl-C was pressed
        self.previous: dict = {}

    def __enter__(self) -> "PreemptionNotice":
        if threading.current_thread() is threading.main_thread():  # Python lets only that one handle signals
            self.previous = {number: signal.signal(number, self._note) for number in notices()}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        self.name = self.name or signal.Signals(number).name
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if self.interrupted is not None and now - self.interrupted > self.SAME_KEY:
            raise KeyboardInterrupt
        if self.interrupted is None and self.accelerator.is_main_process:
            # Not by print, which may be what the signal has interrupted
            os.write(2, b"\nCtrl-C: saving after this step. Once more stops at once, without saving.\n")
        self.interrupted = self.interrupted or now

    @property
    def exit_code(self) -> int:
        return INTERRUPTED_EXIT_CODE if self.interrupted is not None else PREEMPTED_EXIT_CODE

    @property
    def received(self) -> bool:
        """Whether any process has had notice; to be asked by all of them at the same point."""
        if self.accelerator.num_processes == 1:
            return self.name is not None
        mine = torch.tensor(int(self.name is not None), device=self.accelerator.device)
        return bool(self.accelerator.reduce(mine, "sum"))


def watch_nonfinite(state: RunState, output: StepOutput) -> None:
    """
    Count a skipped step.

    Raises:
        FloatingPointError: after `max_nonfinite_steps` of them in a row, with the terms that were not finite.
    """
    if not output.nonfinite:
        state.nonfinite_in_a_row = 0
        return
    state.nonfinite_steps += 1
    state.nonfinite_in_a_row += 1
    terms = ", ".join(output.nonfinite)
    if state.accelerator.is_main_process:
        logger.warning("step %d skipped: not finite: %s.", state.step, terms)
    if state.nonfinite_in_a_row >= state.config.max_nonfinite_steps:
        raise FloatingPointError(
            f"step {state.step}: {state.nonfinite_in_a_row} steps in a row (max_nonfinite_steps) were not finite in: "
            f"{terms}. Losses: {output.losses}. Lower the learning rate, or resume with mixed_precision bf16 or no."
        )
