"""`hf-vqgan`: its commands, the processes that it starts, and how they end."""

import argparse
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from conftest import TINY

from hf_vqgan import cli
from hf_vqgan.commands import launcher
from hf_vqgan.training.recipes import RECIPES, recipe_names

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "hf_vqgan"]


def run(*argv: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, *argv], capture_output=True, text=True, timeout=120, **options)


def test_every_module_is_a_command():
    modules = {file.stem for file in (ROOT / "hf_vqgan" / "commands").glob("*.py")} - {"__init__", "launcher"}
    assert {name.replace("-", "_") for name in cli.COMMANDS} == modules
    for name, command in cli.COMMANDS.items():
        module = importlib.import_module(f"hf_vqgan.commands.{name.replace('-', '_')}")
        assert callable(module.main) and hasattr(module, "make_parser") >= command.processes
        assert f"hf-vqgan {name}" in module.__doc__


def test_help_takes_no_library_and_the_library_is_there_when_asked_for():
    """Torch, transformers and diffusers take seconds to import; classes are registered as by `import hf_vqgan`."""
    program = """
import sys
sys.argv = ["/somewhere/bin/hf-vqgan"]
from hf_vqgan.cli import main
main(["--version"]), main(["recipes"])
assert not {"torch", "transformers", "diffusers", "numpy"} & sys.modules.keys()
import hf_vqgan
assert not hasattr(hf_vqgan, "VQGANModle")
name = hf_vqgan.VQGANConfig.__name__
from transformers import AutoConfig
assert type(AutoConfig.for_model("vqgan")).__name__ == name
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "quickstart" in done.stdout


def test_overview_and_unknown_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    listed = capsys.readouterr().out
    assert all(f"\n  {name} " in listed and command.summary in listed for name, command in cli.COMMANDS.items())
    with pytest.raises(SystemExit) as stop:
        cli.main(["trian", "--num_processes", "2"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "hf-vqgan: error: unknown command 'trian'; did you mean train?\n"


# Recipes


def test_recipes_are_listed_and_printed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hf-vqgan"])
    cli.main(["recipes"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == recipe_names()
    # Each a sentence of its own, which fits a terminal's line
    assert all(line.endswith(".") and len(line) < 130 for line in lines)
    for name in recipe_names():
        cli.main(["recipes", name])
        assert capsys.readouterr().out == (RECIPES / f"{name}.yaml").read_text()
    with pytest.raises(SystemExit, match="quikstart: no such file, and no recipe .* Did you mean quickstart?"):
        cli.main(["recipes", "quikstart"])


def test_recipes_stay_where_they_were_in_a_checkout():
    """The repository's documentation and its users have named scripts/recipes/*.yaml."""
    link = ROOT / "scripts" / "recipes"
    assert link.is_symlink() and os.readlink(link) == "../hf_vqgan/recipes" and link.samefile(RECIPES)


# Processes


def parser_of(command: str) -> argparse.ArgumentParser:
    return importlib.import_module(f"hf_vqgan.commands.{command}").make_parser()


def test_flags_of_launcher_and_command():
    """A flag that both have is the command's, and what is started is not the user's to say."""
    argv = "a b --num_processes 2 --config r.yaml --config_file c.yaml --multi_gpu --main-process-port=0 --no_python -h"
    launch, others = launcher.split_flags(argv.split(), launch_command_parser(), parser_of("encode"))
    assert launch == ["--num_processes", "2", "--config_file", "c.yaml", "--multi_gpu", "--main-process-port=0"]
    assert others == ["a", "b", "--config", "r.yaml", "--no_python", "-h"]
    launch, others = launcher.split_flags(
        ["--mixed_precision", "bf16", "--cpu"], launch_command_parser(), parser_of("train")
    )
    assert (launch, others) == (["--cpu"], ["--mixed_precision", "bf16"])


@pytest.mark.parametrize(
    "flags, config, multiple, processes",
    [
        ("--num_processes 2", None, True, 2),
        ("--cpu --num_processes 3", None, True, 3),
        ("--cpu", None, False, 1),
        ("", {"distributed_type": "MULTI_CPU", "num_processes": 2}, True, None),
        ("", {"distributed_type": "NO", "num_processes": 1}, False, None),
        ("--num_processes 2", {"distributed_type": "NO", "num_processes": 1}, True, 2),
        ("--num_processes 2 --use_fsdp", None, False, 2),
    ],
)
def test_processes_on_cpu_are_as_many_as_asked_for(flags, config, multiple, processes, tmp_path, monkeypatch):
    """The launcher itself starts one process on CPU, whatever --num_processes says."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "")
    monkeypatch.setattr(launcher, "default_config_file", "")
    if config is not None:
        base = {"compute_environment": "LOCAL_MACHINE", "use_cpu": True, "mixed_precision": "no", "debug": False}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(base | config))
        flags += f" --config_file {tmp_path / 'config.yaml'}"
    parser = launch_command_parser()
    arguments = parser.parse_args([*flags.split(), "script"])
    launcher._fill_in(arguments, parser)
    assert (bool(arguments.multi_gpu), arguments.num_processes) == (multiple, processes)
    assert (os.environ["ACCELERATE_USE_CPU"] == "true") == multiple


@pytest.mark.parametrize("code, expected", [(0, 0), (1, 1), (2, 2), (75, 75), (130, 130), (-9, 137)])
def test_exit_codes_pass_through(code, expected, monkeypatch, capsys):
    def fail(arguments):
        if code:
            raise subprocess.CalledProcessError(code, "worker")

    monkeypatch.setattr(launcher, "launch_command", fail)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        launcher._launch(argparse.Namespace())
    assert stop.value.code == expected and signal.getsignal(signal.SIGTERM) == before
    assert ("SIGKILL" in capsys.readouterr().err) == (code < 0)


@pytest.fixture
def environment(tmp_path) -> dict:
    """In which no file of the user's asks for a launch."""
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "home")}


@pytest.mark.parametrize(
    "argv, code, message",
    [
        (["--num_processes", "two"], 2, "hf-vqgan train: error: argument --num_processes/--num-processes: invalid int"),
        (
            ["--num_processes", "2", "--hub_tokn=hf_secret"],
            2,
            "hf-vqgan train: error: unknown argument '--hub_tokn'; did",
        ),
        (["--num_processes", "2", "--learning_rate", "nan"], 1, "hf-vqgan train: error: learning_rate=nan must be"),
    ],
)
def test_mistakes_are_told_before_anything_is_launched(argv, code, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hf-vqgan"])
    monkeypatch.setattr(launcher, "launch_command", None)
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", *argv])
    printed = capsys.readouterr().err or str(stop.value.code)
    assert printed.startswith(message) and printed.count("\n") <= 1 and "secret" not in printed
    assert stop.value.code == code or (code == 1 and isinstance(stop.value.code, str))


def test_an_error_of_two_processes_is_one_line(tmp_path, environment):
    """Not one for each, nor a launcher's traceback, nor one of the connection that the other process has lost."""
    flags = ["--num_processes", "2", "--dataset_name", "./typo", "--perceptual_weight", "0"]
    done = run("train", *flags, cwd=tmp_path, env=environment)
    lines = [line for line in done.stderr.splitlines() if line]
    assert done.returncode == 1 and len(lines) == 1, done.stderr
    assert lines[0].startswith("hf-vqgan train: error: dataset './typo': no such file")
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == []


def test_sigterm_reaches_two_processes(image_folder, random_trunk, tmp_path, environment):
    """Both are told, the run is saved, and a scheduler gets to see that it should be started again."""
    fields = TINY | {
        "config": "none",
        "dataset_name": image_folder,
        "output_dir": "run",
        "resolution": 32,
        "train_batch_size": 2,
        "max_train_steps": 5000,
        "logging_steps": 1,
        "disc_channels": 8,
        "disc_layers": 1,
        "perceptual_net": "alex",
        "perceptual_weights_path": random_trunk / "alex.safetensors",
        "cpu_threads": 1,
        "dataloader_num_workers": 0,
    }  # fmt: skip
    command = [*COMMAND, "train", "--num_processes", "2"]
    for name, value in fields.items():
        command += [f"--{name}", *(map(str, value) if isinstance(value, (list, tuple)) else [str(value)])]
    with open(tmp_path / "log", "w+") as log:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
        deadline = time.monotonic() + 120
        while process.poll() is None and not (tmp_path / "run" / "log.jsonl").is_file() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.terminate()
        code = process.wait(timeout=60)
        log.seek(0)
        printed = log.read()
    assert code == 75, printed
    assert "2 process(es)" in printed and "Traceback" not in printed
    assert printed.count("stopped by SIGTERM: saved step") == 1
    assert list((tmp_path / "run").glob("checkpoint-*"))


def test_ctrl_c_while_importing(tmp_path, environment):
    process = subprocess.Popen([*COMMAND, "train"], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert (
        process.communicate(timeout=60)[1].endswith("hf-vqgan train: stopped by Ctrl-C.\n")
        and process.returncode == 130
    )
