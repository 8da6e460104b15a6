"""What the one loop promises, for every kind of task it runs."""

import dataclasses
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file

import hf_vqgan.generation.diffusion
import hf_vqgan.generation.tokens
import hf_vqgan.training.tokenizer
from hf_vqgan import VQGANConfig
from hf_vqgan.generation.denoisers import LatentDiffusionConfig
from hf_vqgan.generation.token_models import TokenTrainingConfig
from hf_vqgan.training.configuration import VQGANTrainingConfig
from hf_vqgan.training.interruption import Preempted
from hf_vqgan.training.setup import load_batches


@dataclass
class Trainer:
    """
    A trainer with settings for a short run.

    Args:
        weights: Where a run's model is.
        loss: The name of a function that is called once for each micro-batch; NaN pixels do not make its result NaN.
    """

    train: Callable
    config: VQGANTrainingConfig | LatentDiffusionConfig | TokenTrainingConfig
    weights: str
    loss: str | None = None

    def run(self, output_dir: Path, dry_run: bool = False, **fields) -> dict:
        return self.train(dataclasses.replace(self.config, output_dir=str(output_dir), **fields), dry_run)

    def final_weights(self, output_dir: Path) -> dict[str, torch.Tensor]:
        return load_file(output_dir / self.weights)


COMMON = dict(train_batch_size=4, max_train_steps=6, logging_steps=1, checkpointing_steps=2, cpu_threads=1,
              dataloader_num_workers=0, lr_warmup_steps=0)  # fmt: skip


def tokenizer(tmp_path: Path, images: str, random_trunk: Path) -> Trainer:
    model_config = VQGANConfig(**TINY)
    config = VQGANTrainingConfig(
        dataset_name=images, resolution=32, perceptual_net="alex", disc_channels=8, disc_layers=1, validation_steps=3,
        perceptual_weights_path=str(random_trunk / "alex.safetensors"), latent_statistics_images=4, **COMMON,
    )  # fmt: skip

    def train(config, dry_run):
        return hf_vqgan.training.tokenizer.train(config, model_config, dry_run)

    return Trainer(train, config, "model.safetensors")


def denoiser(tmp_path: Path, images: str, trained_model) -> Trainer:
    trained_model.save_pretrained(tmp_path / "vqgan")
    config = LatentDiffusionConfig(
        vqgan=str(tmp_path / "vqgan"), dataset_name=images, resolution=32, random_flip=True, denoiser="unet",
        block_out_channels=[8, 16], layers_per_block=1, attention_levels=1, norm_num_groups=4, attention_head_dim=4,
        sample_steps=3, sample_images=2, sample_inference_steps=2, **COMMON,
    )  # fmt: skip
    return Trainer(
        hf_vqgan.generation.diffusion.train_latent_diffusion, config, "denoiser/diffusion_pytorch_model.safetensors"
    )


def token_model(tmp_path: Path, images: str, trained_model, kind: str) -> Trainer:
    trained_model.save_pretrained(tmp_path / "vqgan")
    config = TokenTrainingConfig(
        vqgan=str(tmp_path / "vqgan"), dataset_name=images, resolution=16, random_flip=True, token_model=kind,
        hidden_size=16, num_layers=1, num_attention_heads=2, random_order=0.5 * (kind == "autoregressive"),
        sample_steps=3, sample_images=2, sample_inference_steps=2, **COMMON,
    )  # fmt: skip
    return Trainer(
        hf_vqgan.generation.tokens.train_token_model, config, "token_model/model.safetensors",
        "hf_vqgan.generation.tokens.token_loss",
    )  # fmt: skip


@pytest.fixture(params=["tokenizer", "denoiser", "tokens-autoregressive", "tokens-masked"])
def trainer(request, tmp_path, image_folder, random_trunk, trained_model) -> Trainer:
    if request.param == "tokenizer":
        return tokenizer(tmp_path, str(image_folder), random_trunk)
    if request.param == "denoiser":
        return denoiser(tmp_path, str(image_folder), trained_model)
    return token_model(tmp_path, str(image_folder), trained_model, request.param.removeprefix("tokens-"))


def rows_of(output_dir: Path) -> list[dict]:
    """The log, but for what depends on the clock."""
    rows = [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "per_second" not in k and k != "data_wait"} for row in rows]


def after_step(step: int, action: Callable[[], None]) -> Callable:
    """In the place of `count_bad_images`, which the loop calls after every step."""

    def act(state, *args):
        if state.step == step:
            action()

    return act


def raise_interrupt():
    raise KeyboardInterrupt


def assert_same_run(trainer: Trainer, one: Path, other: Path):
    ours, theirs = trainer.final_weights(one), trainer.final_weights(other)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)
    assert rows_of(one) == rows_of(other)


def test_killed_run_ends_as_an_uninterrupted_one(trainer, tmp_path):
    whole = trainer.run(tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_vqgan.training.loop.count_bad_images", after_step(5, raise_interrupt))
        with pytest.raises(KeyboardInterrupt):
            trainer.run(tmp_path / "killed")
    assert not hf_vqgan.training.loop.tqdm._instances  # closed, or the error would be written into its line
    assert sorted(path.name for path in (tmp_path / "killed").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    resumed = trainer.run(tmp_path / "killed")
    assert_same_run(trainer, tmp_path / "whole", tmp_path / "killed")
    timed = {"seconds", "samples_per_second"}
    assert {k: v for k, v in whole.items() if k not in timed} == {k: v for k, v in resumed.items() if k not in timed}


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_notice_saves_and_stops(trainer, tmp_path, number, code):
    trainer.run(tmp_path / "whole", checkpointing_steps=100)
    with pytest.MonkeyPatch.context() as patch:
        notice = after_step(3, lambda: os.kill(os.getpid(), number))
        patch.setattr("hf_vqgan.training.loop.count_bad_images", notice)
        with pytest.raises(Preempted, match="saved step 3") as stop:
            trainer.run(tmp_path / "stopped", checkpointing_steps=100)
    assert stop.value.exit_code == code
    assert [path.name for path in (tmp_path / "stopped").glob("checkpoint-*")] == ["checkpoint-3"]
    assert (tmp_path / "stopped" / trainer.weights).is_file()
    trainer.run(tmp_path / "stopped", checkpointing_steps=100)
    assert_same_run(trainer, tmp_path / "whole", tmp_path / "stopped")


def poison(patch: pytest.MonkeyPatch, trainer: Trainer, step: int, times: int = 1) -> None:
    """Make batches, or the loss, of steps `step` to `step + times - 1` NaN. They count from 0."""
    if trainer.loss is not None:
        module, name = trainer.loss.rsplit(".", 1)
        loss, numbers = getattr(sys.modules[module], name), itertools.count()
        patch.setattr(
            trainer.loss, lambda *args: loss(*args) * (torch.nan if step <= next(numbers) < step + times else 1)
        )
        return

    def load(dataset, batch_size, start, stop, **options):
        for number, batch in enumerate(load_batches(dataset, batch_size, start, stop, **options), start):
            pixels = batch["pixel_values"]
            yield batch | {"pixel_values": pixels * torch.nan if step <= number < step + times else pixels}

    patch.setattr("hf_vqgan.training.setup.load_batches", load)


def test_steps_that_are_not_finite_are_skipped_up_to_a_limit(trainer, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, trainer, 2)
        trainer.run(tmp_path / "one", max_nonfinite_steps=2)
    assert [row["nonfinite_steps"] for row in rows_of(tmp_path / "one") if "nonfinite_steps" in row] == [
        0,
        0,
        1,
        1,
        1,
        1,
    ]
    assert all(weight.isfinite().all() for weight in trainer.final_weights(tmp_path / "one").values())
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, trainer, 5)  # the last step
        assert trainer.run(tmp_path / "last")["steps"] == 6
    assert trainer.run(tmp_path / "last")["steps"] == 6  # metrics.json is JSON, so the run is complete
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, trainer, 2, times=2)
        with pytest.raises(
            FloatingPointError, match=r"step 4: 2 steps in a row \(max_nonfinite_steps\) were not finite"
        ):
            trainer.run(tmp_path / "two", max_nonfinite_steps=2)


def test_dry_run_leaves_nothing(trainer, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert trainer.run(tmp_path / "run", dry_run=True) == {}
    printed = capsys.readouterr().out
    assert "steps: 6" in printed and "OK: 3 steps and a " in printed
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "training_config.yaml").write_text("learning_rate: 7.0\n")
    with pytest.raises(FileExistsError, match="holds another run"):
        trainer.run(tmp_path / "run", dry_run=True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["training_config.yaml"]


def test_unreadable_images_are_counted_and_too_many_end_the_run(trainer, tmp_path, image_folder, caplog, capsys):
    first = sorted(path for path in Path(image_folder).rglob("*.png") if "train" in str(path))[0]
    first.write_bytes(b"no image")
    trainer.run(tmp_path / "run", max_train_steps=12)
    assert sum("skipped an unreadable image" in record.message for record in caplog.records) == 1
    assert "1 unreadable image(s)" in capsys.readouterr().out
    with pytest.raises(ValueError, match="could not be read, more than max_unreadable_share=0.01"):
        trainer.run(tmp_path / "strict", max_train_steps=40, max_unreadable_share=0.01, checkpointing_steps=100,
                    **({"validation_steps": 100} if trainer.weights == "model.safetensors" else {}))  # fmt: skip


def test_complete_run_is_left_alone_unless_its_model_is_gone(trainer, tmp_path):
    metrics = trainer.run(tmp_path / "run")
    written = (tmp_path / "run" / trainer.weights).stat().st_mtime_ns
    assert trainer.run(tmp_path / "run") == metrics
    assert (tmp_path / "run" / trainer.weights).stat().st_mtime_ns == written
    (tmp_path / "run" / trainer.weights).unlink()
    with pytest.raises(ValueError, match="the run is complete, but .* is missing"):
        trainer.run(tmp_path / "run")
