"""What a run is going to do: told before it starts, and rehearsed by a dry run."""

import contextlib
import statistics
import tempfile
import time
from pathlib import Path

from .run_folder import RunFolder
from .task import Task


def format_plan(lines: dict[str, str]) -> str:
    return "\n".join(f"{name:>10}: {text}" for name, text in lines.items())


def rehearse(task: Task, steps: int = 3) -> str:
    """
    Take a few steps with everything on that would start later, evaluate once, and see whether `output_dir` can be
    written to and is this run's. Nothing is left but the changed state of the task.

    Returns:
        A line that says so, and how long the run will take.

    Raises:
        OSError: if the folder cannot be written to, or holds another run (FileExistsError).
        ValueError: if what it holds of this run is damaged.
        FloatingPointError: if a loss or gradient is not finite.
    """
    config, accelerator = task.state.config, task.state.accelerator
    RunFolder(config, task.model_config, accelerator).check()
    check_writable(Path(config.output_dir))
    seconds = []
    with contextlib.closing(task.batches(steps)) as loader:
        for _ in range(steps):
            started = time.perf_counter()
            output = task.rehearse_step([next(loader) for _ in range(config.gradient_accumulation_steps)])
            seconds.append(time.perf_counter() - started)
            if output.nonfinite and accelerator.scaler is None:  # fp16 finds its scale by skipping steps
                raise FloatingPointError(f"not finite in a first step: {', '.join(output.nonfinite)}.")
    evaluated = task.rehearse_evaluation()
    a_step = statistics.median(seconds[1:])  # the first one warms up
    return (
        f"OK: {steps} steps and {evaluated} went through, and {config.output_dir} can be written to. "
        f"{config.max_train_steps:,} steps of {a_step:.2g} s take about {duration(config.max_train_steps * a_step)}, "
        "without what happens between steps."
    )


def check_writable(folder: Path) -> None:
    """Raise OSError if a folder, which need not be there yet, could not be written to. Leaves nothing."""
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise OSError(f"output_dir={str(folder)!r} cannot be written to: {nearest}: {error.strerror}.") from error


def duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"
