"""The one training loop: a task's steps, and around them log, checkpoints, interruptions and resumption."""

import contextlib
import itertools
import logging
import time
from collections.abc import Collection

import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..data.datasets import WaitClock
from ..hub.push import push_checkpoint
from .interruption import Preempted, PreemptionNotice, watch_nonfinite
from .plan import rehearse
from .run_folder import RunFolder, public_settings
from .task import RunState, StepOutput, Task, due

logger = logging.getLogger(__name__)

NAMED_IMAGES = 10  # of the unreadable ones, how many are named; all are counted


def run_task(task: Task, dry_run: bool = False) -> dict[str, float]:
    """
    Train `task` to its last step, from the latest checkpoint in its `output_dir` if there is one, and leave there the
    model, metrics.json, pictures, log.jsonl, training_config.yaml and checkpoint-N/.

    With `dry_run`, print the plan, take a few steps, say how long the run will take, and leave nothing behind.

    Returns:
        The final metrics, as in metrics.json (empty for a dry run).

    Raises:
        FileExistsError: if `output_dir` holds a different run.
        ValueError: for a checkpoint that does not fit, before anything is written.
        FloatingPointError: after `max_nonfinite_steps` steps in a row with a loss or gradient that is not finite.
        Preempted: after SIGTERM, SIGUSR1 or Ctrl-C, once a checkpoint is saved.
        KeyboardInterrupt: after a second Ctrl-C, at once.
        OSError: if a checkpoint cannot be written. Earlier ones stay as they were, here and in all cases above.
    """
    state = task.state
    config, accelerator = state.config, state.accelerator
    accelerator.print(task.describe_plan())
    if accelerator.is_main_process and (idle := task.idle_settings()):
        logger.warning(
            "in %d steps these settings have no effect, or not all of it: %s. Raise --max_train_steps, or lower them.",
            config.max_train_steps,
            "; ".join(idle),
        )
    if dry_run:
        accelerator.print(rehearse(task))
        return {}

    with RunFolder(config, task.model_config, accelerator) as run:
        if checkpoint := run.open():
            run.load_checkpoint(checkpoint, task.checkpoint_parts())
            accelerator.print(f"Resuming from {checkpoint} at step {state.step}.")
        run.truncate_log(state.step)
        if state.step >= config.max_train_steps:
            accelerator.print(f"The run in {config.output_dir} is already complete ({state.step} steps).")
            run.require_model(task.model_files)
            metrics = run.read_metrics()
            push(task, run)
            return metrics
        if config.report_to:
            settings = {name: str(value) for name, value in public_settings(config).items()}
            accelerator.init_trackers(task.name, settings, init_kwargs={"wandb": {"dir": config.output_dir}})
        task.prepare()
        # Closed at once, whatever happens: workers that outlive the notice also outlive the program, which waits for
        # them.
        loader = task.batches(config.max_train_steps)
        with PreemptionNotice(accelerator) as notice, contextlib.closing(loader), progress_bar(state) as progress:
            take_steps(task, run, WaitClock(loader), notice, progress)
        if state.unreadable or state.upscaled:
            accelerator.print(describe_bad_images(state))
        metrics = run.read_metrics()
        if config.report_to:
            accelerator.end_training()  # which also ends the processes' group: nothing can be exchanged after it
        return metrics


def progress_bar(state: RunState) -> tqdm:
    """To be closed whatever ends the steps, so that what is said of it gets a line of its own."""
    total, silent = state.config.max_train_steps, not state.accelerator.is_main_process
    return tqdm(total=total, initial=state.step, desc="train", disable=silent)


def take_steps(task: Task, run: RunFolder, loader: WaitClock, notice: PreemptionNotice, progress: tqdm) -> None:
    """The steps from `state.step` to the last, with what happens between them."""
    state = task.state
    config, accelerator = state.config, state.accelerator
    started = time.perf_counter() - state.seconds
    while state.step < config.max_train_steps:
        progress.set_description(task.phase, refresh=False)
        micro_batches = [next(loader) for _ in range(config.gradient_accumulation_steps)]
        output = task.take_step(micro_batches, run)
        state.seconds = time.perf_counter() - started
        watch_nonfinite(state, output)
        count_bad_images(state, micro_batches)
        progress.update()

        last = state.step == config.max_train_steps
        if due(state.step, config.logging_steps) or last:
            row = log_row(task, output) | {"data_wait": loader.share()}
            run.log(row)
            task.check_health()
            progress.set_postfix({name: f"{row[name]:.3g}" for name in task.shown if name in row})
        news = task.report(run, output, last)
        if news and accelerator.is_main_process:
            progress.write(news)
        preempted = notice.received and not last
        saving = due(state.step, config.checkpointing_steps) or last
        if saving or preempted:
            run.save_checkpoint(state.step, task.checkpoint_parts(), task.save_model)
        if preempted:
            by = notice.name or "notice to another process"
            raise Preempted(f"stopped by {by}: saved step {state.step}.", notice.exit_code)
        if saving:
            push(task, run)


def log_row(task: Task, output: StepOutput) -> dict[str, float]:
    """One line of log.jsonl."""
    state = task.state
    return {
        "step": state.step,
        **output.losses,
        "grad_norm": output.grad_norm,
        **task.log_row(output),
        "nonfinite_steps": state.nonfinite_steps,
        f"{task.unit}_per_second": state.step * state.global_batch / state.seconds,
    }


def push(task: Task, run: RunFolder) -> None:
    """Push the run to the Hub, if it is to be pushed and has metrics to show."""
    config, state = task.state.config, task.state
    if config.push_to_hub and state.accelerator.is_main_process and run.has_metrics:
        push_checkpoint(
            task.push,
            run.folder,
            config.hub_model_id or run.folder.resolve().name,
            token=config.hub_token,
            private=config.hub_private_repo,
            license=config.hub_license,
            commit_message=f"Step {state.step} of {config.max_train_steps}",
            last=state.step >= config.max_train_steps,
        )


def count_bad_images(state: RunState, micro_batches: list[dict]) -> None:
    """
    Count samples from unreadable and from enlarged images over all processes, and name each unreadable image once.

    Raises:
        ValueError: once the images of more than `max_unreadable_share` of the samples, of at least 100 or one batch,
            were unreadable.
    """
    config, main = state.config, state.accelerator.is_main_process
    met = {name: reason for batch in micro_batches for name, reason in batch["skipped"].items()}
    new = [(name, reason) for name, reason in met.items() if name not in state.unreadable_images]
    counts = sum(torch.stack([batch["unreadable"].sum(), batch["upscaled"].sum()]) for batch in micro_batches)
    counts = torch.cat([counts, counts.new_tensor([len(new)])])
    unreadable, upscaled, anywhere_new = state.accelerator.reduce(counts, "sum").tolist()
    if anywhere_new:  # in all processes or in none, as all must gather together
        for name, reason in gather_object(new):
            named = len(state.unreadable_images)
            if main and name not in state.unreadable_images and named < NAMED_IMAGES:
                logger.warning("skipped an unreadable image: %s", reason)
            state.unreadable_images[name] = None
    if upscaled and not state.upscaled and main:
        logger.warning("Some images are smaller than the crops and are enlarged.")
    state.unreadable += unreadable
    state.upscaled += upscaled
    seen = state.step * state.global_batch
    if seen >= 100 and state.unreadable > config.max_unreadable_share * seen:
        raise ValueError(
            f"{state.unreadable} of {seen} training images could not be read, more than "
            f"max_unreadable_share={config.max_unreadable_share}: {name_some(state.unreadable_images)}. Repair the "
            "dataset, or raise the share."
        )


def name_some(names: Collection[str]) -> str:
    """The first few of the names, and how many more there are."""
    more = len(names) - NAMED_IMAGES
    return ", ".join(itertools.islice(names, NAMED_IMAGES)) + (f" and {more:,} more" if more > 0 else "")


def describe_bad_images(state: RunState) -> str:
    """One line about the whole run."""
    parts = []
    if state.unreadable:
        images = f"{len(state.unreadable_images):,} unreadable image(s): {name_some(state.unreadable_images)}"
        parts.append(f"{images}; replaced in {state.unreadable:,} training sample(s)")
    if state.upscaled:
        parts.append(f"{state.upscaled:,} training sample(s) from enlarged images")
    return "Over all epochs: " + "; ".join(parts) + "."
