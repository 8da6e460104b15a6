"""A run from its command to what it leaves behind, and everything that can interrupt it."""

import dataclasses
import errno
import json
import math
import multiprocessing
import os
import re
import resource
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import DistributedType
from conftest import SPECIAL, TINY
from PIL import Image
from safetensors.torch import load_file

import hf_vqgan
from hf_vqgan import QUANTIZERS, VQGANConfig, VQGANModel
from hf_vqgan.configuration_vqgan import model_fields
from hf_vqgan.data.datasets import ImageTransform, TrainingImages, notices
from hf_vqgan.data.images import TrainingOptions, load_image_datasets
from hf_vqgan.evaluation.comparison import EvaluationConfig, evaluate
from hf_vqgan.measurement.metrics import CodebookHealth, DiscriminatorHealth
from hf_vqgan.training.arguments import ModelArguments, RecipeParser, given
from hf_vqgan.training.configuration import VQGANTrainingConfig
from hf_vqgan.training.interruption import CodebookCollapse, Preempted, PreemptionNotice
from hf_vqgan.training.networks import build_state
from hf_vqgan.training.setup import build_accelerator, check_distributed_type
from hf_vqgan.training.tokenizer import TokenizerTask, measure_scale, train


def run_config(image_folder, random_trunk, output_dir, **fields) -> VQGANTrainingConfig:
    defaults = dict(
        dataset_name=str(image_folder),
        output_dir=str(output_dir),
        resolution=32,
        resize=40,
        train_batch_size=4,
        max_train_steps=6,
        learning_rate=1e-3,
        quantize_start=1,
        dead_code_restart_steps=2,
        perceptual_net="alex",
        perceptual_weights_path=str(random_trunk / "alex.safetensors"),
        disc_start=2,
        disc_channels=8,
        disc_layers=1,
        logging_steps=1,
        validation_steps=3,
        checkpointing_steps=2,
        latent_statistics_images=20,
        cpu_threads=1,
        dataloader_num_workers=0,
    )
    return VQGANTrainingConfig(**defaults | fields)


@pytest.fixture
def tiny():
    return VQGANConfig(**TINY)


def test_what_a_run_leaves_behind(image_folder, random_trunk, tmp_path, tiny):
    folder = tmp_path / "run"
    metrics = train(run_config(image_folder, random_trunk, folder), tiny)
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert {"psnr", "ssim", "lpips", "perplexity", "usage", "seconds", "protocol"} <= metrics.keys()
    assert metrics["steps"] == 6 and metrics["num_images"] == 2
    names = {file.name for file in folder.iterdir() if file.suffix != ".py"}  # the code travels with the model
    assert names == {
        ".lock", "codebook.png",
        "config.json", "model.safetensors", "preprocessor_config.json", "metrics.json", "reconstructions.png",
        "curves.png", "log.jsonl", "training_config.yaml", "checkpoint-4", "checkpoint-6",
    }  # fmt: skip
    with Image.open(folder / "reconstructions.png") as picture:
        assert picture.width >= 3 * 32
    model = VQGANModel.from_pretrained(folder)
    measured = {name: metrics[name] for name in ("scaling_factor", "shift_factor")}
    for name in model_fields():
        assert getattr(model.config, name) == measured.get(name, getattr(tiny, name))
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "l1" in row] == [1, 2, 3, 4, 5, 6]
    assert {"l1", "l2", "perceptual", "commitment", "codebook", "adversarial", "disc_real"} <= rows[-2].keys()


def test_scaling_factor_gives_unit_variance(image_folder, random_trunk, tmp_path, tiny):
    """On the very crops it was measured on; and it does not make the same command look like another run."""
    config = run_config(image_folder, random_trunk, tmp_path / "run", max_train_steps=2, random_flip=False)
    config = dataclasses.replace(config, center_crop=True, latent_statistics_images=12)  # each image once
    metrics = train(config, tiny)
    assert (tiny.scaling_factor, tiny.shift_factor) == (1.0, 0.0)
    images, _ = load_image_datasets(TrainingOptions(config.dataset_name))
    crops = TrainingImages(images, ImageTransform(32, 40, center_crop=True, random_flip=False))
    model = VQGANModel.from_pretrained(tmp_path / "run")
    with torch.no_grad():
        latents = model.encode(torch.stack([crops[item]["pixel_values"] for item in range(12)])).latents.double()
    normal = (latents - model.config.shift_factor) * model.config.scaling_factor
    assert abs(normal.mean()) < 1e-5 and normal.std(correction=0) == pytest.approx(1, abs=1e-5)
    assert model.config.scaling_factor == metrics["scaling_factor"] != 1
    assert train(config, tiny) == metrics  # complete, not refused
    untouched = dataclasses.replace(config, latent_statistics_images=0, overwrite_output_dir=True)
    assert "scaling_factor" not in train(untouched, tiny)
    assert VQGANModel.from_pretrained(tmp_path / "run").config.scaling_factor == 1.0


@pytest.mark.parametrize("bias", [0.0, 3.7, math.nan])
def test_latents_without_a_scale_are_warned_of(image_folder, random_trunk, tmp_path, tiny, caplog, monkeypatch, bias):
    """A dead encoder's run ends all the same, and config.json has numbers in it."""

    def kill(state, dataset):
        torch.nn.init.zeros_(state.vqgan.quant_conv.weight)
        torch.nn.init.constant_(state.vqgan.quant_conv.bias, bias)
        measure_scale(state, dataset)
        torch.nn.init.zeros_(state.vqgan.quant_conv.bias)

    monkeypatch.setattr("hf_vqgan.training.tokenizer.measure_scale", kill)
    tiny = VQGANConfig(**TINY, scaling_factor=0.5, shift_factor=0.25)
    metrics = train(run_config(image_folder, random_trunk, tmp_path / "run", max_train_steps=1, quantize_start=0), tiny)
    assert sum("constant or not finite" in record.message for record in caplog.records) == 1
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["scaling_factor"], config["shift_factor"]) == (0.5, 0.25) and "scaling_factor" not in metrics


def test_resumed_run_ends_in_the_same_weights(image_folder, random_trunk, tmp_path, tiny):
    config = run_config(image_folder, random_trunk, tmp_path / "whole")
    train(config, tiny)
    stopped = dataclasses.replace(config, output_dir=str(tmp_path / "stopped"))
    with pytest.MonkeyPatch.context() as patch:
        # Killed after the fifth step: the last checkpoint is that of step 4.
        patch.setattr("hf_vqgan.training.loop.count_bad_images", stop_after(5))
        with pytest.raises(KeyboardInterrupt):
            train(stopped, tiny)
    train(stopped, tiny)  # the same command again
    models = [VQGANModel.from_pretrained(tmp_path / name) for name in ("whole", "stopped")]
    assert models[0].config.scaling_factor == models[1].config.scaling_factor != 1
    whole, resumed = (model.state_dict() for model in models)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    losses = [
        [
            {k: v for k, v in json.loads(line).items() if k not in ("images_per_second", "data_wait")}
            for line in file.read_text().splitlines()
        ]
        for file in (tmp_path / "whole" / "log.jsonl", tmp_path / "stopped" / "log.jsonl")
    ]
    assert losses[0] == losses[1]


def stop_after(step):
    def count(state, *args):
        if state.step == step:
            raise KeyboardInterrupt

    return count


def test_run_leaves_no_process_behind(image_folder, random_trunk, tmp_path, tiny):
    """Workers outlive a notice of preemption; one that also outlived its run would keep the program from ending."""
    config = run_config(image_folder, random_trunk, tmp_path / "run", max_train_steps=2, dataloader_num_workers=1)
    train(config, tiny)
    assert multiprocessing.active_children() == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_vqgan.training.loop.count_bad_images", stop_after(1))
        with pytest.raises(KeyboardInterrupt):
            train(dataclasses.replace(config, output_dir=str(tmp_path / "stopped")), tiny)
        assert multiprocessing.active_children() == []


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(folder: Path, other: Path):
    ours, theirs = final_weights(folder), final_weights(other)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)


@pytest.mark.parametrize(
    "number, workers, code", [(signal.SIGTERM, 0, 75), (signal.SIGUSR1, 0, 75), (signal.SIGINT, 1, 130)]
)
def test_notice_of_preemption_saves_and_stops(image_folder, random_trunk, tmp_path, tiny, number, workers, code):
    """Ctrl-C is one, too; a terminal sends it to the workers as well."""
    config = run_config(image_folder, random_trunk, tmp_path / "whole", checkpointing_steps=100, use_ema=True)
    train(config, tiny)
    stopped = dataclasses.replace(config, output_dir=str(tmp_path / "stopped"))
    before = signal.getsignal(number)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_vqgan.training.loop.count_bad_images", signal_at(3, number))
        with pytest.raises(Preempted, match=f"stopped by {signal.Signals(number).name}: saved step 3") as stop:
            train(dataclasses.replace(stopped, dataloader_num_workers=workers), tiny)
    assert stop.value.exit_code == code and multiprocessing.active_children() == []
    assert signal.getsignal(number) == before
    assert [path.name for path in (tmp_path / "stopped").glob("checkpoint-*")] == ["checkpoint-3"]
    train(stopped, tiny)
    assert_same_weights(tmp_path / "whole", tmp_path / "stopped")


def signal_at(step, number, times=1):
    """In the place of `count_bad_images`: the signal to this process and its workers after that step."""

    def send(state, *_):
        if state.step == step:
            for process in [os.getpid(), *(child.pid for child in multiprocessing.active_children())] * times:
                os.kill(process, number)

    return send


def test_second_ctrl_c_stops_at_once(image_folder, random_trunk, tmp_path, tiny, monkeypatch):
    """But not the same one, which a launcher may pass on once more."""
    monkeypatch.setattr("hf_vqgan.training.loop.count_bad_images", signal_at(3, signal.SIGINT, times=2))
    config = run_config(image_folder, random_trunk, tmp_path / "run", checkpointing_steps=100)
    with pytest.raises(Preempted):
        train(dataclasses.replace(config, output_dir=str(tmp_path / "same")), tiny)
    monkeypatch.setattr(PreemptionNotice, "SAME_KEY", -1.0)
    with pytest.raises(KeyboardInterrupt):
        train(config, tiny)
    assert not list((tmp_path / "run").glob("*checkpoint-*"))


def test_systems_without_some_signals(monkeypatch):
    assert notices() == [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
    monkeypatch.delattr(signal, "SIGUSR1")  # as on Windows
    assert notices() == [signal.SIGTERM, signal.SIGINT]


def test_damaged_checkpoints_are_passed_over(image_folder, random_trunk, tmp_path, tiny, caplog):
    config = run_config(image_folder, random_trunk, tmp_path / "run", checkpoints_total_limit=None)
    train(config, tiny)
    whole = final_weights(tmp_path / "run")
    six, four = (tmp_path / "run" / f"checkpoint-{step}" for step in (6, 4))
    file = max(six.iterdir(), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-100])
    contents = bytearray((four / "optimizer.safetensors").read_bytes())
    contents[len(contents) // 2] ^= 1
    (four / "optimizer.safetensors").write_bytes(contents)
    for path in ("model.safetensors", "log.jsonl"):
        (tmp_path / "run" / path).unlink()
    with pytest.raises(ValueError, match="checkpoint-4: the checkpoint is damaged: optimizer.safetensors has other"):
        train(dataclasses.replace(config, resume_from_checkpoint=str(four)), tiny)
    train(config, tiny)
    messages = [record.message for record in caplog.records if "is damaged" in record.message]
    assert len(messages) == 2
    assert f"{six} is damaged ({file.name} has" in messages[0] and "bytes instead of" in messages[0]
    assert all(torch.equal(tensor, whole[name]) for name, tensor in final_weights(tmp_path / "run").items())
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "l1" in row] == [3, 4, 5, 6]  # from checkpoint-2 on


def test_log_line_cut_off_by_a_kill_is_dropped(image_folder, random_trunk, tmp_path, tiny):
    config = run_config(image_folder, random_trunk, tmp_path / "run", max_train_steps=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_vqgan.training.loop.count_bad_images", stop_after(3))
        with pytest.raises(KeyboardInterrupt):
            train(config, tiny)
    with open(tmp_path / "run" / "log.jsonl", "a") as log:
        log.write('{"step": 3, "l1": 0.')
    train(config, tiny)
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "l1" in row] == [1, 2, 3, 4]


def test_full_disk_loses_no_checkpoint(image_folder, random_trunk, tmp_path, tiny, monkeypatch):
    """The limit on file sizes makes writing fail as a full disk does: in the middle of a file."""
    config = run_config(image_folder, random_trunk, tmp_path / "run")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_disk(state, *_):
        if state.step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))

    with monkeypatch.context() as patch:
        patch.setattr("hf_vqgan.training.loop.count_bad_images", fill_disk)
        try:
            with pytest.raises(OSError, match=r"step 4 could not be written .*untouched: checkpoint-2. Make room"):
                train(config, tiny)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in (tmp_path / "run").glob("*checkpoint-*")] == ["checkpoint-2"]
    train(config, tiny)
    train(dataclasses.replace(config, output_dir=str(tmp_path / "whole")), tiny)
    assert_same_weights(tmp_path / "whole", tmp_path / "run")


def test_steps_with_nan_are_skipped_and_counted_up_to_a_limit(image_folder, random_trunk, tmp_path, tiny, monkeypatch):
    real_step = hf_vqgan.training.tokenizer.training_step

    def broken_step(state, micro_batches):
        if state.step in poisoned:
            micro_batches = [pixels * torch.nan for pixels in micro_batches]
        return real_step(state, micro_batches)

    monkeypatch.setattr("hf_vqgan.training.tokenizer.training_step", broken_step)
    poisoned = {2, 4}
    config = run_config(image_folder, random_trunk, tmp_path / "some", max_nonfinite_steps=2, logging_steps=1)
    metrics = train(config, tiny)
    assert metrics["nonfinite_steps"] == 2 and all(
        w.isfinite().all() for w in final_weights(tmp_path / "some").values()
    )
    lines = (tmp_path / "some" / "log.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert {row["step"] for row in rows if "nonfinite_steps" in row and "l1" not in row} == {3, 5}
    poisoned = {2, 3}
    with pytest.raises(FloatingPointError, match=r"step 4: 2 steps in a row .*not finite in: l1, l2, perceptual"):
        train(dataclasses.replace(config, output_dir=str(tmp_path / "many")), tiny)


def test_averaged_weights_are_validated_and_saved(image_folder, random_trunk, tmp_path, tiny):
    """With decay d, the average becomes d * average + (1 - d) * weights; checkpoints hold both."""
    config = run_config(image_folder, random_trunk, tmp_path / "run", use_ema=True, model_ema_decay=0.25,
                        max_train_steps=4, checkpointing_steps=1, checkpoints_total_limit=None)  # fmt: skip
    metrics = train(config, tiny)
    raw = load_file(tmp_path / "run" / "checkpoint-4" / "model.safetensors")
    saved, names = final_weights(tmp_path / "run"), [name for name, _ in VQGANModel(tiny).named_parameters()]

    def averages(step):
        saved = load_file(tmp_path / "run" / f"checkpoint-{step}" / "averages.safetensors")
        return {name: saved[f"shadow_params.{name}"] for name in names}

    moved = [name for name in names if not torch.equal(raw[name], saved[name])]
    assert len(moved) > len(names) / 2
    for name in moved:
        if "quantize" not in name:  # restarted codes take their average along
            torch.testing.assert_close(saved[name], 0.25 * averages(3)[name] + 0.75 * raw[name])
    assert all(torch.equal(saved[name], tensor) for name, tensor in averages(4).items())
    model = VQGANModel.from_pretrained(tmp_path / "run")
    _, validation = hf_vqgan.training.networks.load_images(config, tiny, build_accelerator(config))
    report = hf_vqgan.training.tokenizer.evaluate_reconstruction(model, (image[None] for image in validation))
    assert report.psnr == pytest.approx(metrics["psnr"], rel=1e-4)


def test_each_network_has_its_own_schedule(image_folder, random_trunk, tmp_path, tiny):
    config = run_config(image_folder, random_trunk, tmp_path / "run", lr_scheduler="constant_with_warmup",
                        learning_rate=1.0, lr_warmup_steps=4, disc_learning_rate=0.5, disc_lr_scheduler="linear",
                        disc_lr_warmup_steps=0, max_train_steps=6, disc_start=2)  # fmt: skip
    state = build_state(config, tiny, build_accelerator(config), None)
    rates = []
    for optimizer, schedule in ((state.optimizer, state.scheduler), (state.disc_optimizer, state.disc_scheduler)):
        rates.append([])
        for _ in range(5):
            rates[-1].append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
    assert rates[0] == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert rates[1] == pytest.approx([0.5, 0.375, 0.25, 0.125, 0])  # over the 4 steps from disc_start on


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at inputs
def test_compiled_run_learns_the_same(image_folder, random_trunk, tmp_path, tiny):
    """Traced, but not compiled to machine code: that takes minutes."""
    config = run_config(image_folder, random_trunk, tmp_path / "plain", max_train_steps=3, latent_statistics_images=0)
    train(config, tiny)
    compiled = dict(output_dir=str(tmp_path / "compiled"), torch_compile=True, torch_compile_backend="aot_eager")
    train(dataclasses.replace(config, **compiled), tiny)
    plain, other = final_weights(tmp_path / "plain"), final_weights(tmp_path / "compiled")
    assert plain.keys() == other.keys()
    for name in plain:
        torch.testing.assert_close(plain[name], other[name], rtol=1e-3, atol=1e-4)


def test_missing_bitsandbytes_is_named(image_folder, random_trunk, tmp_path, tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    config = run_config(image_folder, random_trunk, tmp_path / "run", use_8bit_adam=True)
    with pytest.raises(ValueError, match="use_8bit_adam=True needs bitsandbytes"):
        train(config, tiny)


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_sharded_launches_are_refused(kind):
    with pytest.raises(ValueError, match=f"this launch uses {kind.value}.*launch with DDP"):
        check_distributed_type(kind)
    for supported in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        check_distributed_type(supported)


def test_pictures_reach_the_tracker(image_folder, random_trunk, tmp_path, tiny):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(run_config(image_folder, random_trunk, tmp_path / "run", report_to="tensorboard"), tiny)
    events = event_accumulator.EventAccumulator(str(tmp_path / "run" / "vqgan"), {"images": 0, "scalars": 0})
    events.Reload()
    assert {"reconstructions", "curves", "codebook"} <= set(events.Tags()["images"])
    assert [event.step for event in events.Images("curves")] == [3, 6]
    assert [event.step for event in events.Scalars("l1")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("disc_type", ["stylegan", "patchgan"])
def test_runs_with_every_aid_for_small_datasets(
    image_folder, random_trunk, tmp_path, tiny, disc_type, monkeypatch, caplog
):
    monkeypatch.setattr(DiscriminatorHealth, "diagnosis", lambda health: "The discriminator has won.")
    aids = dict(disc_type=disc_type, lecam_weight=0.1, r1_weight=1.0, r1_interval=2, disc_start=1)
    config = run_config(image_folder, random_trunk, tmp_path / "run", diff_augment=["color", "cutout"], **aids)
    train(config, tiny)
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "disc_r1" in row] == [2, 4, 6]
    assert [row["step"] for row in rows if "disc_lecam" in row] == [3, 4, 5, 6]  # anchors exist after the first
    assert {"disc_real_accuracy", "logits_fake", "gradient_ratio"} <= rows[2].keys() - rows[0].keys()
    assert [record.message for record in caplog.records].count("The discriminator has won.") == 1


def test_complete_run_is_left_alone_and_other_runs_are_refused(image_folder, random_trunk, tmp_path, tiny, capsys):
    config = run_config(image_folder, random_trunk, tmp_path / "run", max_train_steps=2, quantize_start=0)
    metrics = train(config, tiny)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*.safetensors")}
    assert train(config, tiny) == metrics
    assert "already complete" in capsys.readouterr().out
    other = dataclasses.replace(config, learning_rate=5e-4)
    with pytest.raises(FileExistsError, match="holds another run; it differs in: learning_rate"):
        train(other, tiny)
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*.safetensors")}
    assert train(dataclasses.replace(other, overwrite_output_dir=True), tiny)["steps"] == 2


@pytest.mark.parametrize(
    "quantizer", [name for name in QUANTIZERS if name not in ("vq", "gumbel")], ids=lambda name: name
)
def test_every_quantizer_trains(image_folder, random_trunk, tmp_path, quantizer):
    """Upkeep, health, pictures and checkpoints with each kind of quantizer, codes per position included."""
    model_config = VQGANConfig(**TINY | {"quantizer": quantizer} | SPECIAL.get(quantizer, {}))
    config = run_config(image_folder, random_trunk, tmp_path / "run", max_train_steps=4, validation_steps=4)
    metrics = train(config, model_config)
    assert metrics["perplexity"] > 1
    assert VQGANModel.from_pretrained(tmp_path / "run").config.quantizer == quantizer


def test_collapse_is_warned_of_once_or_stops_the_run(image_folder, random_trunk, tmp_path, tiny, caplog, monkeypatch):
    monkeypatch.setattr(CodebookHealth, "diagnosis", lambda health: "The codebook has collapsed.")
    train(run_config(image_folder, random_trunk, tmp_path / "warned"), tiny)
    assert [record.message for record in caplog.records].count("The codebook has collapsed.") == 1
    with pytest.raises(CodebookCollapse, match="step 1: The codebook has collapsed"):
        train(run_config(image_folder, random_trunk, tmp_path / "stopped", stop_on_collapse=True), tiny)


def test_fine_tuning_starts_from_the_given_model(image_folder, random_trunk, tmp_path, tiny_model):
    tiny_model.save_pretrained(tmp_path / "pretrained")
    config = run_config(image_folder, random_trunk, tmp_path / "run", init_from=str(tmp_path / "pretrained"),
                        max_train_steps=1, learning_rate=0.0, quantize_start=0)  # fmt: skip
    train(config, tiny_model.config)
    tuned = VQGANModel.from_pretrained(tmp_path / "run").state_dict()
    assert all(torch.equal(tuned[name], tensor) for name, tensor in tiny_model.state_dict().items())


def test_what_does_not_fit_the_model_to_start_from_is_named(image_folder, random_trunk, tmp_path, tiny_model):
    tiny_model.save_pretrained(tmp_path / "pretrained")
    config = run_config(image_folder, random_trunk, tmp_path / "run", init_from=str(tmp_path / "pretrained"))
    message = r"weights of other shapes than this run's, which has num_vq_embeddings=32 \(there 16\)\.$"
    with pytest.raises(ValueError, match=message):
        train(config, VQGANConfig(**TINY | {"num_vq_embeddings": 32}))
    (tmp_path / "pretrained" / "config.json").unlink()  # as in a run's checkpoints
    (tmp_path / "pretrained" / "manifest.json").touch()
    (tmp_path / "pretrained").rename(tmp_path / "checkpoint-6")
    config.init_from = str(tmp_path / "checkpoint-6")
    with pytest.raises(FileNotFoundError, match=f"has no config.json, .* a run's checkpoint; .* is {tmp_path}"):
        train(config, tiny_model.config)
    assert not (tmp_path / "run").exists()


def test_dry_run_trains_everything_and_leaves_nothing(image_folder, random_trunk, tmp_path, tiny, capsys, monkeypatch):
    """Discriminator and quantizer too, which start later."""
    seen = []

    def watched_step(state, micro_batches):
        before = [[p.detach().clone() for p in network.parameters()] for network in (state.model, state.discriminator)]
        output = hf_vqgan.training.step.training_step(state, micro_batches)
        after = (state.model.parameters(), state.discriminator.parameters())
        moved = [
            any(not torch.equal(a, b) for a, b in zip(*pair, strict=True)) for pair in zip(before, after, strict=True)
        ]
        seen.append((state.quantizing, *moved))
        return output

    monkeypatch.setattr("hf_vqgan.training.tokenizer.training_step", watched_step)
    config = run_config(image_folder, random_trunk, tmp_path / "run", quantize_start=4, disc_start=5)
    before = sorted(tmp_path.rglob("*"))
    assert train(config, tiny, dry_run=True) == {}
    plan = capsys.readouterr().out
    assert "12 training images, 2 for validation" in plan and "16x16 codes of 16" in plan
    assert seen == [(True, True, True)] * 3
    assert re.match(r"OK: .* 6 steps of \S+ s take about \d+ (seconds|minutes)", plan.splitlines()[-1])
    assert sorted(tmp_path.rglob("*")) == before


def test_dry_run_in_fp16_passes_over_the_steps_that_find_the_scale(
    image_folder, random_trunk, tmp_path, tiny, monkeypatch
):
    """Which is what makes them not finite; in float32, the same is an error."""

    def overflow(state, micro_batches):
        output = hf_vqgan.training.step.training_step(state, micro_batches)
        return dataclasses.replace(output, nonfinite=("grad_norm",))

    monkeypatch.setattr("hf_vqgan.training.tokenizer.training_step", overflow)
    config = run_config(image_folder, random_trunk, tmp_path / "run")
    with pytest.raises(FloatingPointError, match="not finite in a first step: grad_norm"):
        train(config, tiny, dry_run=True)
    accelerator = build_accelerator(config)
    perceptual, metric = hf_vqgan.training.networks.load_lpips(config, accelerator)
    state = build_state(config, tiny, accelerator, perceptual)
    accelerator.scaler = torch.amp.GradScaler("cpu")
    dataset, validation = hf_vqgan.training.networks.load_images(config, tiny, accelerator)
    task = TokenizerTask(state, dataset, validation, metric, tiny)
    assert hf_vqgan.training.plan.rehearse(task).startswith("OK: ")


def test_dry_run_tries_whether_the_folder_can_be_written_to(image_folder, random_trunk, tmp_path, tiny, monkeypatch):
    (tmp_path / "file").write_text("")
    config = run_config(image_folder, random_trunk, tmp_path / "file" / "run")
    with pytest.raises(FileExistsError, match="output_dir .*file/run cannot be made: .*file is a file. Choose another"):
        train(config, tiny, dry_run=True)

    def refuse(dir):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("hf_vqgan.training.plan.tempfile.TemporaryFile", refuse)
    with pytest.raises(OSError, match="output_dir='.*new/run' cannot be written to: .*: Permission denied"):
        train(dataclasses.replace(config, output_dir=str(tmp_path / "new" / "run")), tiny, dry_run=True)


@pytest.mark.parametrize(
    "fields, training, validation",
    [
        ({}, "shorter side to 40 pixels, 1 random 32x32 crop", "the central 32x32; .* same with --resize 40"),
        (
            {"resize": None, "center_crop": True},
            "to 32 pixels, 1 central 32x32 crop",
            "to 32 pixels, the central 32x32$",
        ),
        (
            {"resize": 0, "crops_per_image": 3},
            "at their own size, 3 random",
            "at their own size, the central.*--resize 0",
        ),
        ({"validate_whole_images": True}, "to 40 pixels", "shorter side to 40 pixels, whole images$"),
    ],
)
def test_the_plan_says_how_images_are_cut(
    image_folder, random_trunk, tmp_path, tiny, capsys, fields, training, validation
):
    train(run_config(image_folder, random_trunk, tmp_path / "run", **fields), tiny, dry_run=True)
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if ": " in line)
    assert re.search(training, lines["     crops"]) and re.search(validation, lines["validation"])


def test_settings_that_the_run_is_too_short_for_are_named_once(
    image_folder, random_trunk, tmp_path, tiny, capsys, caplog
):
    config = run_config(image_folder, random_trunk, tmp_path / "run", disc_start=6, lr_warmup_steps=24,
                        lr_scheduler="cosine", dead_code_restart_steps=10)  # fmt: skip
    train(config, tiny)
    expected = (
        "disc_start=6: no discriminator, no adversarial loss; lr_warmup_steps=24: learning_rate ends at 25%; "
        "dead_code_restart_steps=10: no code is unused for so long"
    )
    assert f"no effect: {expected}\n" in capsys.readouterr().out
    messages = [record.message for record in caplog.records if "no effect" in record.message]
    assert messages == [f"in 6 steps these settings have no effect, or not all of it: {expected}. Raise "
                        "--max_train_steps, or lower them."]  # fmt: skip


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"disc_start": 5, "disc_ramp_steps": 4}, ["disc_ramp_steps=4: the adversarial weight ends at 25% of itself"]),
        ({"lr_warmup_steps": 2}, ["lr_warmup_steps=2: for --lr_scheduler constant_with_warmup and others"]),
        ({"stop_on_collapse": True, "codebook_window": 6, "quantize_start": 1},
         ["stop_on_collapse: codebook_window=6 never fills"]),
        ({"entropy_anneal_factor": 2.0, "entropy_anneal_steps": 9},
         ["entropy_anneal_steps=9: the factor does not come down to 1"]),
        ({"disc_start": 6, "adversarial_weight": 0.0}, []),
        ({"disc_start": 2, "disc_ramp_steps": 4, "lr_warmup_steps": 6, "lr_scheduler": "linear",
          "dead_code_restart_steps": 6}, []),
    ],
)  # fmt: skip
def test_what_a_run_is_too_short_for(fields, expected):
    assert VQGANTrainingConfig(dataset_name="x", max_train_steps=6, **fields).never_reached() == expected


def test_a_run_that_never_quantizes_is_refused(image_folder, random_trunk, tmp_path, tiny):
    """It would end as an autoencoder whose codes nobody has seen: a brown rectangle, and exit code 0."""
    message = "quantize_start=6 is never reached within max_train_steps={}: .*Lower --quantize_start .*or raise"
    with pytest.raises(ValueError, match=message.format(6)):
        run_config(image_folder, random_trunk, tmp_path / "run", quantize_start=6)
    epochs = run_config(image_folder, random_trunk, tmp_path / "run", quantize_start=6, max_train_steps=None)
    with pytest.raises(ValueError, match=message.format(3)):  # one epoch of 12 images
        train(epochs, tiny)
    assert not (tmp_path / "run").exists()


def test_no_code_is_counted_before_there_are_any(image_folder, random_trunk, tmp_path, tiny, monkeypatch):
    phases, describe = [], hf_vqgan.training.loop.tqdm.set_description
    monkeypatch.setattr(
        hf_vqgan.training.loop.tqdm,
        "set_description",
        lambda bar, text, **kw: (phases.append(text), describe(bar, text, **kw)),
    )
    train(run_config(image_folder, random_trunk, tmp_path / "run", quantize_start=4), tiny)
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    of_codes = {"perplexity", "usage", "dead_codes", "top_code_share", "restarted_codes"}
    counted = {row["step"]: of_codes & row.keys() for row in rows if "l1" in row}
    assert counted == {step: of_codes if step > 4 else set() for step in range(1, 7)}
    assert phases == ["autoencoder until step 4"] * 4 + ["train"] * 2


def test_training_and_evaluation_measure_the_same(image_folder, random_trunk, tmp_path):
    """On images of one's own with the quickstart's recipe, whose crops were made for other images."""
    trunk = str(random_trunk / "alex.safetensors")
    flags = dict(
        dataset_name=image_folder,
        output_dir=tmp_path / "run",
        perceptual_weights_path=trunk,
        quantize_start=1,
        max_train_steps=3,
        train_batch_size=4,
        cpu_threads=1,
        dataloader_num_workers=0,
    )
    recipe = Path(__file__).parent.parent / "scripts" / "recipes" / "quickstart.yaml"
    parser = RecipeParser((VQGANTrainingConfig, ModelArguments), default_recipe=recipe)
    config, model, *_ = parser.parse([f"--{name}={value}" for name, value in flags.items()])
    metrics = train(config, VQGANConfig(sample_size=config.resolution, **given(model)))
    config = EvaluationConfig(
        output_dir=str(tmp_path / "out"),
        lpips=["alex"],
        alex_weights_path=trunk,
        inception=False,
        anchors=["none"],
        cpu_threads=1,
    )
    found = evaluate([str(tmp_path / "run")], str(image_folder), config)
    assert found["protocol"]["split"] == "validation" and found["num_images"] == metrics["num_images"] == 2
    for name in ("psnr", "ssim", "lpips", "l1"):
        assert found[name] == pytest.approx(metrics[name], rel=1e-5)


@pytest.mark.parametrize(
    "fields, error, message",
    [
        ({"resolution": 33}, ValueError, "resolution=33 is not a multiple of 2"),
        ({"init_from": "runs/mine/typo"}, FileNotFoundError, "model 'runs/mine/typo': no such file or folder here"),
        ({"resolution": 16}, ValueError, "resolution=16 is too small for LPIPS with validation_net='alex'.*31 pixels"),
        ({"resume_from_checkpoint": "gone"}, FileNotFoundError, "--resume_from_checkpoint gone: no such folder"),
        ({"mixed_precision": "fp16"}, ValueError, "mixed_precision='fp16' does not work on device cpu"),
        ({"image_column": "label"}, ValueError, "'label' is not an image column"),
        ({"torch_compile": True, "torch_compile_backend": "typo"}, ValueError, "torch_compile_backend='typo' must be"),
    ],
)
def test_bad_settings_write_nothing(image_folder, random_trunk, tmp_path, tiny, fields, error, message):
    with pytest.raises(error, match=message):
        train(run_config(image_folder, random_trunk, tmp_path / "run", **fields), tiny)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"encoder_only": True}, "encoder_only=True: a model without a decoder"),
        ({"out_channels": 1}, "out_channels=1: training images are RGB, so it must be 3"),
        ({"in_channels": 4}, "in_channels=4: training images are RGB, so it must be 3"),
    ],
)
def test_models_that_cannot_be_trained_are_refused_at_once(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        train(VQGANTrainingConfig(dataset_name="nowhere/to_be_found"), VQGANConfig(**TINY | fields))


def test_too_many_unreadable_images_stop_the_run(image_folder, random_trunk, tmp_path, tiny):
    for number in range(6):
        (image_folder / "train" / f"{number:02d}.png").write_bytes(b"broken")
    config = run_config(image_folder, random_trunk, tmp_path / "run", max_train_steps=40)
    with pytest.raises(ValueError, match="training images could not be read, more than max_unreadable_share=0.2"):
        train(config, tiny)
    tolerant = dataclasses.replace(
        config, max_unreadable_share=1.0, max_train_steps=3, output_dir=str(tmp_path / "other")
    )
    assert train(tolerant, tiny)["unreadable_images"] > 0


def test_every_field_of_the_configuration_is_read():
    """A flag that nothing reads is a lie."""
    package = Path(hf_vqgan.__file__).parent
    sources = [file.read_text() for file in package.rglob("*.py") if file.name != "configuration.py"]
    taken_whole = {field.name for field in dataclasses.fields(TrainingOptions)}  # by TrainingOptions.of(..., config)
    names = {field.name for field in dataclasses.fields(VQGANTrainingConfig)} - taken_whole
    assert {name for name in names if not any(f"config.{name}" in source for source in sources)} == set()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"train_batch_size": 0}, "train_batch_size=0 must be at least 1"),
        ({"l1_weight": -1.0}, "l1_weight=-1.0 must be at least 0"),
        ({"max_train_samples": 0}, "max_train_samples=0 must be at least 1"),
        ({"max_validation_samples": -1}, "max_validation_samples=-1 must be at least 1"),
        ({"validation_pictures": 0}, "validation_pictures=0 must be at least 1"),
        ({"seed": -1}, r"seed=-1 must be in \[0, 4294967295\]"),
        ({"adam_beta1": 1.0}, r"adam_beta1=1.0 must be in \[0, 1\)"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be a finite number"),
        ({"max_grad_norm": float("inf")}, "max_grad_norm=inf must be a finite number"),
        ({"l2_weight": 10**400}, "l2_weight=1000.* must be a finite number"),
        ({"learning_rate": "abc"}, "learning_rate='abc' must be a finite number"),
        ({"max_train_steps": 1.5}, "max_train_steps=1.5 must be an integer, or null"),
        ({"train_batch_size": True}, "train_batch_size=True must be an integer"),
        ({"random_flip": 1}, "random_flip=1 must be true or false"),
        ({"train_files": "a.png"}, "train_files='a.png' must be a list, and in it a string each"),
        ({"dataset_weights": [1, "x"]}, r"dataset_weights=\[1, 'x'\] must be a list, and in it a finite number each"),
        ({"dataset_weights": [1, 0], "extra_datasets": ["y"]}, r"dataset_weights=\[1, 0\] must be above 0"),
        ({"output_dir": ""}, "output_dir is empty"),
        ({"lr_scheduler": "warp"}, "lr_scheduler='warp' must be one of linear, cosine"),
        ({"report_to": "paper"}, "report_to='paper' must be one of all, "),
        ({"equivariance_share": 0.5, "equivariance_transforms": []}, "equivariance_transforms is empty"),
        ({"adversarial_loss": "wasserstein"}, "adversarial_loss='wasserstein' must be one of"),
        ({"l1_weight": 0.0, "perceptual_weight": 0.0}, "are all 0"),
        ({"dataset_name": ""}, "dataset_name is empty"),
        ({"dataset_weights": [1, 2]}, "2 weights for 1 dataset.*give one weight for each"),
        ({"streaming": True}, "streaming needs max_train_steps"),
        ({"streaming": True, "max_train_steps": 1, "crops_per_image": 2}, "crops_per_image=2 needs streaming=False"),
        ({"shard_groups": 2}, "shard_groups=2 needs streaming=True"),
    ],
)
def test_impossible_values_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        VQGANTrainingConfig(**{"dataset_name": "x"} | fields)


def test_what_says_the_same_in_another_type_is_converted():
    config = VQGANTrainingConfig(
        dataset_name="x", output_dir=Path("runs/mine"), learning_rate=1, train_files=("a", "b"), seed=np.int64(7)
    )
    found = (config.output_dir, config.learning_rate, config.train_files, config.seed)
    assert found == ("runs/mine", 1.0, ["a", "b"], 7) and [type(item) for item in found] == [str, float, list, int]
