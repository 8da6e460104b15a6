"""Several processes for a command of `hf-vqgan`, started by Accelerate's own launcher with Accelerate's own flags."""

import argparse
import contextlib
import itertools
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import psutil
import torch
from accelerate.commands.config import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils import DistributedType
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from ..data.datasets import notices
from ..training.arguments import RecipeParser, errors_in_one_line

# Flags of `accelerate launch` that say what to start, which is settled here.
SETTLED = ("--help", "--module", "--no_python", "--no-python")
# Set in processes that this module has started, and in those of any launcher of several.
LAUNCHED = ("HF_VQGAN_LAUNCHED", "RANK", "LOCAL_RANK")


def launch_if_wanted(command: str, parser: RecipeParser, started_as: str) -> None:
    """
    Run a command, whose flags are in sys.argv, in processes of its own, and end this one with their exit code; or
    return, if this process is to run it itself: as the only one, or because it is one of several already.

    A launch is asked for by any flag of the launcher, by a file that `accelerate config` has written, or by several
    GPUs.

    Args:
        command (`str`): As on the command line.
        parser (`RecipeParser`): Parses the command's flags. One that the launcher has as well is the command's.
        started_as (`str`): sys.argv[0] as Python had it.
    """
    if any(name in os.environ for name in LAUNCHED):
        return
    launch_parser = launch_command_parser()
    launch_parser.error = parser.error  # in one line
    launch_flags, flags = split_flags(sys.argv[1:], launch_parser, parser)
    if not launch_flags and not os.path.isfile(default_config_file) and torch.cuda.device_count() < 2:
        return
    with errors_in_one_line():
        parser.parse(flags)  # said once, and before anything is started
        is_script = Path(started_as).name == "hf-vqgan" and Path(started_as).is_file()  # not by -m, nor an .exe
        arguments = launch_parser.parse_args([*launch_flags, started_as if is_script else "hf_vqgan", command, *flags])
        arguments.module = not is_script
        _fill_in(arguments, launch_parser)
        os.environ[LAUNCHED[0]] = "1"
        _launch(arguments)


def split_flags(
    argv: list[str], launch_parser: argparse.ArgumentParser, parser: argparse.ArgumentParser
) -> tuple[list[str], list[str]]:
    """The launcher's flags with their values, and everything else."""
    known = launch_parser._option_string_actions.keys() - parser._option_string_actions.keys() - set(SETTLED)
    launch_flags, others = [], []
    waiting = iter(argv)
    for text in waiting:
        flag, equals, _ = text.partition("=")
        if not flag.startswith("--") or flag not in known:
            others.append(text)
            continue
        launch_flags.append(text)
        if not equals and launch_parser._option_string_actions[flag].nargs != 0:
            launch_flags += itertools.islice(waiting, 1)
    return launch_flags, others


def _fill_in(arguments: argparse.Namespace, launch_parser: argparse.ArgumentParser) -> None:
    """
    What the launcher would guess with a warning, or wrongly: without --multi_gpu it may start one process of several
    that were asked for, and on CPU it always does.
    """
    if arguments.num_processes is not None and arguments.num_processes < 1:
        launch_parser.error(f"argument --num_processes: must be at least 1, found {arguments.num_processes}")
    configured = arguments.config_file is not None or os.path.isfile(default_config_file)
    defaults = load_config_from_file(arguments.config_file) if configured else None
    processes = arguments.num_processes or getattr(defaults, "num_processes", None) or max(1, torch.cuda.device_count())
    machines = arguments.num_machines or getattr(defaults, "num_machines", None) or 1

    # Torch's launcher for several processes, which talk by gloo on CPU, unless something else was asked for
    kind = getattr(defaults, "distributed_type", DistributedType.NO)
    others = arguments.tpu, arguments.use_deepspeed, arguments.use_fsdp, arguments.use_megatron_lm
    plain = not any(others) and kind in (DistributedType.NO, DistributedType.MULTI_CPU)
    if processes > 1 and plain and arguments.mpirun_hostfile is None:
        if arguments.cpu or getattr(defaults, "use_cpu", False) or not torch.accelerator.is_available():
            os.environ["ACCELERATE_USE_CPU"] = "true"
        arguments.cpu, arguments.multi_gpu = False, True

    if defaults is None:
        arguments.num_processes, arguments.num_machines = processes, machines
        arguments.mixed_precision = arguments.mixed_precision or "no"
        arguments.dynamo_backend = arguments.dynamo_backend or "no"
    if machines == 1 and not (arguments.main_process_port or getattr(defaults, "main_process_port", None)):
        arguments.main_process_port = 0  # a free one, so that runs can be neighbours
    # Workers save and end by themselves. The launcher's own handling gives them 30 seconds and hides their exit code.
    arguments.signals_to_handle = ",".join(name for name in ("SIGHUP", "SIGQUIT") if hasattr(signal, name))


def _launch(arguments: argparse.Namespace) -> NoReturn:
    """Start the processes, wait for them, and end with the exit code of the first that failed."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # a worker's last line says it all
    code = 0
    try:
        with _notices_to_workers():
            launch_command(arguments)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
    except subprocess.CalledProcessError as error:
        code = error.returncode
    except SignalException as error:
        code = -error.sigval
    if code < 0 and code != -signal.SIGINT:  # of Ctrl-C, the processes have told
        print(f"{Path(sys.argv[0]).name}: a process was ended by {signal.Signals(-code).name}.", file=sys.stderr)
    sys.exit(code if code >= 0 else 128 - code)  # of signals, as shells have it


@contextlib.contextmanager
def _notices_to_workers() -> Iterator[None]:
    """Pass on what asks a run to save and stop. Without a worker yet, it ends this process."""

    def pass_on(number: int, frame) -> None:
        workers = psutil.Process().children()
        if not workers:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        for worker in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.send_signal(number)

    previous = {number: signal.signal(number, pass_on) for number in notices()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
