"""
The command `hf-vqgan`: one table of commands, each a module in hf_vqgan/commands/.

What takes long to import is imported once it is needed: lists, help and typing errors come at once.
"""

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

from . import __version__

PROGRAM = "hf-vqgan"


class Command(NamedTuple):
    """
    Args:
        summary: What it does, for the list of commands.
        processes: Whether it can run in several processes, started by Accelerate.
        needs_library: Whether it needs torch, transformers and diffusers, which take seconds to import.
    """

    summary: str
    processes: bool = False
    needs_library: bool = True


# `train-diffusion` is hf_vqgan/commands/train_diffusion.py: a module with `main()`, and with `make_parser()` if it can
# run in several processes.
COMMANDS = {
    "train": Command("Train a VQ-GAN.", processes=True),
    "evaluate": Command("Measure how well models reconstruct a dataset.", processes=True),
    "analyze": Command("Measure and picture a model's latent space."),
    "encode": Command("Encode an image dataset into latents and codes.", processes=True),
    "train-diffusion": Command("Train a latent diffusion model on a VQ-GAN's latents.", processes=True),
    "train-tokens": Command("Train a model of a VQ-GAN's tokens, autoregressive or masked.", processes=True),
    "evaluate-generation": Command("Measure how close generated images are to real ones.", processes=True),
    "convert": Command("Convert a published VQ tokenizer, or export to another project's format."),
    "app": Command("Serve a page to play with trained models."),
    "recipes": Command("List the recipes that come with the package, or print one.", needs_library=False),
}


def main(argv: Sequence[str] | None = None) -> None:
    """
    Run a command.

    Args:
        argv (`Sequence[str]`, *optional*): Command and flags. Default: those of the command line.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        sys.exit(0 if argv else 2)
    if argv[0] == "--version":
        print(f"hf_vqgan {__version__}")
    elif argv[0] in COMMANDS:
        _run(*argv)
    else:
        _refuse(argv[0])


def _overview() -> str:
    lines = [f"usage: {PROGRAM} COMMAND ...", "", "VQ-GAN image tokenizers: train, measure, convert, use.", ""]
    lines += [f"  {name:20} {command.summary}" for name, command in COMMANDS.items()]
    lines += ["", f"`{PROGRAM} COMMAND --help` shows a command's flags, `{PROGRAM} --version` the version."]
    return "\n".join(lines)


def _refuse(name: str) -> NoReturn:
    close = difflib.get_close_matches(name, COMMANDS, 1)
    hint = f"did you mean {close[0]}?" if close else f"commands: {', '.join(COMMANDS)}."
    print(f"{PROGRAM}: error: unknown command {name!r}; {hint}", file=sys.stderr)
    sys.exit(2)


def _run(name: str, *argv: str) -> None:
    """A command, which finds its name and its flags in sys.argv, in this process or in those of a launcher."""
    started_as = sys.argv[0]
    sys.argv = [f"{PROGRAM} {name}", *argv]
    try:
        if COMMANDS[name].needs_library:
            importlib.import_module("hf_vqgan.registration")
        module = importlib.import_module(f"hf_vqgan.commands.{name.replace('-', '_')}")
        if COMMANDS[name].processes:
            launcher = importlib.import_module("hf_vqgan.commands.launcher")
            launcher.launch_if_wanted(name, module.make_parser(), started_as)
        module.main()
    except KeyboardInterrupt:  # while importing; once a command is at work, it says so itself
        if os.environ.get("RANK", "0") == "0":
            print(f"{PROGRAM} {name}: stopped by Ctrl-C.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever reads the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
