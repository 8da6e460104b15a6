"""What users can mend ends every script with one line, never with a traceback."""

import runpy
import sys
from pathlib import Path

import pytest

from hf_vqgan.training.arguments import errors_in_one_line
from hf_vqgan.training.interruption import CodebookCollapse, Preempted

SCRIPTS = Path(__file__).parent.parent / "scripts"
MISTYPED = {
    "train_vqgan.py": ["--dataset_name", "./typo", "--output_dir", "run", "--perceptual_weight", "0"],
    "evaluate_vqgan.py": ["./typo", "photos"],
    "encode_dataset.py": ["./typo", "photos", "out"],
    "train_latent_diffusion.py": ["--vqgan", "./typo", "--dataset_name", "photos"],
    "train_token_model.py": ["--vqgan", "./typo", "--dataset_name", "photos"],
    "evaluate_generation.py": ["./typo", "--dataset_name", "./typo"],
    "analyze_latent_space.py": ["./typo", "photos"],
    "convert_checkpoint.py": ["./typo", "out"],
    "app.py": ["./typo"],
    "study_losses.py": ["--dataset_name", "./typo"],
    "study_collapse.py": ["--dataset_name", "./typo"],
    "benchmark.py": ["quality", "--dataset_name", "./typo"],
}


def run(name: str, argv: list[str], monkeypatch) -> object:
    """What the script ends with: a number, or the line that it prints to stderr before it exits with 1."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPTS / name), *argv])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPTS / name), run_name="__main__")
    return stop.value.code


def test_every_script_is_tried():
    assert set(MISTYPED) == {file.name for file in SCRIPTS.glob("*.py")}


@pytest.mark.filterwarnings("default")  # benchmark.py changes what is done about warnings
@pytest.mark.parametrize("name", MISTYPED)
def test_a_mistyped_name_is_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = run(name, MISTYPED[name], monkeypatch)
    assert line.startswith(f"{name}: error: ") and "typo" in line and "\n" not in line and len(line) < 400
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--init_from", "./typo"], "model './typo': no such file or folder here"),
        (["--max_train_steps", "60"], "quantize_start=60 is never reached within max_train_steps=60"),
        (["--learning_rate", "nan"], "learning_rate=nan must be a finite number"),
        (["--encoder_only", "true"], "encoder_only=True: a model without a decoder"),
        (["--block_out_channels", "30", "64", "64"], "norm_num_groups=8 does not divide"),
    ],
)
def test_settings_that_cannot_work_are_one_line(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = run("train_vqgan.py", ["--dataset_name", "./photos", *flags], monkeypatch)
    assert line.startswith(f"train_vqgan.py: error: {message}") and "\n" not in line


@pytest.mark.parametrize(
    "error, code, text",
    [
        (OSError("a\nlong\n  story"), "script.py: error: a long story", ""),
        (CodebookCollapse("it has"), "script.py: error: it has", ""),
        (Preempted("stopped by SIGTERM: saved step 3."), 75, "saved step 3. The same command goes on from there."),
        (Preempted("stopped by SIGINT: saved step 3.", 130), 130, "saved step 3. The same command goes on from there."),
        (KeyboardInterrupt(), 130, "script.py: stopped by Ctrl-C."),
    ],
)
def test_how_a_script_ends(error, code, text, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scripts/script.py"])
    with pytest.raises(SystemExit) as stop, errors_in_one_line():
        raise error
    assert stop.value.code == code
    printed = capsys.readouterr().err
    assert text in printed and printed.count("\n") <= 1


def test_a_bug_keeps_its_traceback():
    with pytest.raises(TypeError), errors_in_one_line():
        raise TypeError
