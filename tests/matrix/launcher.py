"""Real scripts in processes of their own, forked from a server that has imported everything: no import per run."""

import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from pathlib import Path

from PIL import Image

import hf_vqgan.measurement.pictures

SCRIPTS = Path(__file__).parent.parent.parent / "scripts"


def start_server() -> BaseContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_vqgan.training.tokenizer"])
    return context


def as_flags(arguments: dict) -> list[str]:
    flags = []
    for name, value in arguments.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        flags += [f"--{name}", *(str(item).lower() if isinstance(item, bool) else str(item) for item in values)]
    return flags


def run_script(script: str, flags: list[str], environment: dict[str, str], log: str, draw: bool) -> None:
    """In the child: the script as the interpreter would run it, its output in a file, warnings as errors."""
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    # As in a program of one's own. A child of a forkserver would start another one for its data loader's workers, which
    # outlives a SIGKILL.
    multiprocessing.set_start_method("fork", force=True)
    sys.argv = [str(SCRIPTS / script), *flags]
    warnings.simplefilter("error")
    # Accelerate's way to call DDP, and 1x1 convolutions, whose gradients have the same place in memory by two strides
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides", UserWarning)
    if not draw:
        hf_vqgan.measurement.pictures._render = lambda figure: Image.new("RGB", (8, 8))
    runpy.run_path(sys.argv[0], run_name="__main__")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Launcher:
    """
    One script with its flags, in `processes` processes (gloo), which can be run to its end or killed on the way.

    Args:
        log: File that all output is appended to.
        draw: Whether to draw curves and charts, which takes longer than so short a run.
    """

    server: BaseContext
    script: str
    flags: list[str]
    processes: int
    log: Path
    draw: bool = True

    def start(self) -> list[multiprocessing.Process]:
        environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        if self.processes > 1:
            environment |= {"WORLD_SIZE": str(self.processes), "LOCAL_WORLD_SIZE": str(self.processes),
                            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}  # fmt: skip
        children = []
        for rank in range(self.processes):
            own = environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if self.processes > 1 else {})
            child = self.server.Process(
                target=run_script, args=(self.script, self.flags, own, str(self.log), self.draw)
            )
            child.start()
            children.append(child)
        return children

    def finish(self, seconds: float = 180) -> None:
        """
        Raises:
            AssertionError: with the end of the output, if it fails or takes longer.
        """
        children = self.start()
        deadline = time.monotonic() + seconds
        for child in children:
            child.join(max(0, deadline - time.monotonic()))
        codes = [child.exitcode for child in children]
        for child in children:
            child.kill()
        assert codes == [0] * self.processes, f"exit codes {codes}:\n{self.output()[-4000:]}"

    def kill_when(self, ready: Callable[[], bool], seconds: float = 180) -> None:
        """SIGKILL to all processes as soon as `ready`, which has to come before their end."""
        children = self.start()
        deadline = time.monotonic() + seconds
        while all(child.is_alive() for child in children) and not ready() and time.monotonic() < deadline:
            time.sleep(0.002)
        for child in children:
            child.kill()
            child.join()
        codes = [child.exitcode for child in children]
        assert codes == [-signal.SIGKILL] * self.processes and ready(), f"exit codes {codes}:\n{self.output()[-4000:]}"

    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


def read_log(folder: Path) -> list[dict]:
    """The rows of a run's log.jsonl, without those that depend on the clock. NaN and infinity are errors."""

    def refuse(constant: str):
        raise ValueError(f"{folder}/log.jsonl holds {constant}")

    clock = ("images_per_second", "data_wait")
    lines = (folder / "log.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    return [{name: value for name, value in row.items() if name not in clock} for row in rows]
