"""The training step as mathematics, then the run around it."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import SPECIAL, TINY
from PIL import Image

import hf_vqgan
from hf_vqgan import QUANTIZERS, VQGANConfig, VQGANModel
from hf_vqgan.configuration_vqgan import model_fields
from hf_vqgan.data import ImageTransform, TrainingImages, load_image_datasets
from hf_vqgan.discriminators import PatchDiscriminator
from hf_vqgan.losses import LPIPS, adversarial_loss, discriminator_losses
from hf_vqgan.metrics import CodebookHealth
from hf_vqgan.training import CodebookCollapse, TrainState, VQGANTrainingConfig, train, training_step


def double_state(random_trunk, **fields) -> TrainState:
    """A float64 training state with plain SGD of rate 1: a step moves every weight by exactly its gradient."""
    defaults = dict(dataset_name="none", max_grad_norm=0.0, channels_last=False, perceptual_net="alex")
    config = VQGANTrainingConfig(**defaults | fields)
    torch.manual_seed(0)
    model = VQGANModel(VQGANConfig(**TINY)).double()
    torch.nn.init.normal_(model.quantize.embedding.weight, std=0.5)
    discriminator = PatchDiscriminator(channels=8, num_layers=1).double()
    optimizers = [torch.optim.SGD(network.parameters(), lr=1.0) for network in (model, discriminator)]
    schedules = [torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0) for optimizer in optimizers]
    return TrainState(
        config=config,
        accelerator=Accelerator(cpu=True),
        model=model,
        discriminator=discriminator,
        perceptual=LPIPS("alex", str(random_trunk / "alex.safetensors"), upscale=2).double(),
        optimizer=optimizers[0],
        scheduler=schedules[0],
        disc_optimizer=optimizers[1],
        disc_scheduler=schedules[1],
        health=CodebookHealth(TINY["num_vq_embeddings"]),
    )


def weights(*networks) -> list[torch.Tensor]:
    return [p.detach().clone() for network in networks for p in network.parameters()]


def applied_gradients(state: TrainState, micro_batches):
    before = weights(state.model, state.discriminator)
    output = training_step(state, micro_batches)
    after = weights(state.model, state.discriminator)
    return [old - new for old, new in zip(before, after, strict=True)], output


def textbook_gradients(state: TrainState, x: torch.Tensor):
    """taming-transformers' step, written out: two autograd.grad calls for λ, then a full backward per network."""
    config, model, discriminator = state.config, state.model, state.discriminator
    output = model(x)
    rec = (
        config.l1_weight * (output.sample - x).abs().mean()
        + config.l2_weight * (output.sample - x).square().mean()
        + config.perceptual_weight * state.perceptual(output.sample, x).mean()
    )
    adv = adversarial_loss(discriminator(output.sample), config.adversarial_loss)
    last = model.decoder.conv_out.weight
    (rec_grad,) = torch.autograd.grad(rec, last, retain_graph=True)
    (adv_grad,) = torch.autograd.grad(adv, last, retain_graph=True)
    balance = (rec_grad.norm() / (adv_grad.norm() + 1e-4)).clamp(0, config.adaptive_weight_max).detach()
    quantizer = 0.25 * output.losses["commitment"] + output.losses["codebook"]
    loss = rec + balance * config.adversarial_weight * adv + quantizer
    generator_grads = torch.autograd.grad(loss, list(model.parameters()))
    disc = discriminator_losses(discriminator(x), discriminator(output.sample.detach()), config.adversarial_loss)
    disc_grads = torch.autograd.grad(0.5 * sum(disc.values()), list(discriminator.parameters()))
    return [*generator_grads, *disc_grads], balance


def assert_close(gradients, expected):
    for gradient, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("kind", ["hinge", "non_saturating"])
def test_step_equals_the_textbook(random_trunk, kind):
    state = double_state(random_trunk, adversarial_loss=kind, l2_weight=0.5)
    x = torch.rand(4, 3, 16, 16, dtype=torch.float64) * 2 - 1
    expected, balance = textbook_gradients(state, x)
    gradients, output = applied_gradients(state, [x])
    assert output.adaptive_weight == pytest.approx(float(balance), rel=1e-9)
    assert_close(gradients, expected)
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients)


def test_accumulation_equals_a_large_batch(random_trunk):
    """λ included, which other trainers compute anew for each micro-batch."""
    x = torch.rand(6, 3, 16, 16, dtype=torch.float64) * 2 - 1
    whole, one = applied_gradients(double_state(random_trunk), [x])
    parts, three = applied_gradients(double_state(random_trunk), list(x.split(2)))
    assert_close(parts, whole)
    assert three.adaptive_weight == pytest.approx(one.adaptive_weight, rel=1e-9)
    assert three.losses == pytest.approx(one.losses, rel=1e-9)
    assert torch.equal(three.indices, one.indices) and torch.equal(three.latents, one.latents)


def test_discriminator_waits_for_its_start_and_ramps(random_trunk):
    state = double_state(random_trunk, disc_start=2, disc_ramp_steps=4)
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64) * 2 - 1
    initial = weights(state.discriminator)
    outputs = [training_step(state, [x]) for _ in range(2)]
    assert all("adversarial" not in output.losses and output.adaptive_weight == 0 for output in outputs)
    assert all(torch.equal(a, b) for a, b in zip(initial, weights(state.discriminator), strict=True))
    # At disc_start the discriminator learns while its pull on the generator is still 0.
    off = double_state(random_trunk, adversarial_weight=0.0)
    off.model.load_state_dict(state.model.state_dict())
    off.disc_optimizer = off.discriminator = None
    first = weights(state.model)
    training_step(state, [x])
    training_step(off, [x])
    assert any(not torch.equal(a, b) for a, b in zip(initial, weights(state.discriminator), strict=True))
    moved = zip(weights(state.model), weights(off.model), first, strict=True)
    for with_disc, without, start in moved:
        torch.testing.assert_close(with_disc - start, without - start, rtol=1e-9, atol=1e-13)


def test_no_codebook_gradient_before_quantization(random_trunk):
    state = double_state(random_trunk, quantize_start=1, adversarial_weight=0.0)
    state.discriminator = None
    codebook = state.model.quantize.embedding.weight.detach().clone()
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64) * 2 - 1
    training_step(state, [x])
    assert torch.equal(state.model.quantize.embedding.weight, codebook)
    training_step(state, [x])
    assert not torch.equal(state.model.quantize.embedding.weight, codebook)


def test_entropy_weight_is_annealed(random_trunk):
    state = double_state(random_trunk, quantize_start=10, entropy_anneal_factor=3.0, entropy_anneal_steps=4)
    state.model.quantize.loss_names = ("commitment", "codebook", "entropy")
    state.model.config.entropy_weight = 0.5
    found = {}
    for state.step in (9, 10, 12, 14, 99):
        found[state.step] = state.quantizer_loss_weights()["entropy"]
    assert found == {9: 0, 10: 1.5, 12: 1.0, 14: 0.5, 99: 0.5}


@pytest.mark.parametrize("adversarial_weight", [0.0, 0.8])
def test_nan_stops_before_any_weight_changes(random_trunk, adversarial_weight):
    state = double_state(random_trunk, adversarial_weight=adversarial_weight)
    state.perceptual.heads[0].data.fill_(torch.nan)
    before = weights(state.model, state.discriminator)
    with pytest.raises(FloatingPointError, match="step 0: not finite: perceptual"):
        training_step(state, [torch.rand(2, 3, 16, 16, dtype=torch.float64)])
    assert all(torch.equal(a, b) for a, b in zip(before, weights(state.model, state.discriminator), strict=True))


# ------------------------------------------------------------------------------------------------ a run


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
    )
    return VQGANTrainingConfig(**defaults | fields)


@pytest.fixture
def tiny():
    return VQGANConfig(**TINY)


def test_what_a_run_leaves_behind(image_folder, random_trunk, tmp_path, tiny):
    folder = tmp_path / "run"
    metrics = train(run_config(image_folder, random_trunk, folder), tiny)
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert {"psnr", "ssim", "lpips", "perplexity", "usage", "seconds", "measured_on"} <= metrics.keys()
    assert metrics["steps"] == 6 and metrics["num_images"] == 2
    names = {file.name for file in folder.iterdir() if file.suffix != ".py"}  # the code travels with the model
    assert names == {
        "codebook.png",
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
    images, _ = load_image_datasets(config.dataset_name)
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


def test_resumed_run_ends_in_the_same_weights(image_folder, random_trunk, tmp_path, tiny):
    config = run_config(image_folder, random_trunk, tmp_path / "whole")
    train(config, tiny)
    stopped = dataclasses.replace(config, output_dir=str(tmp_path / "stopped"))
    with pytest.MonkeyPatch.context() as patch:
        # Killed after the fifth step: the last checkpoint is that of step 4.
        patch.setattr("hf_vqgan.training.count_bad_images", stop_after(5))
        with pytest.raises(KeyboardInterrupt):
            train(stopped, tiny)
    train(stopped, tiny)  # the same command again
    models = [VQGANModel.from_pretrained(tmp_path / name) for name in ("whole", "stopped")]
    assert models[0].config.scaling_factor == models[1].config.scaling_factor != 1
    whole, resumed = (model.state_dict() for model in models)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    losses = [
        [
            {k: v for k, v in json.loads(line).items() if k != "images_per_second"}
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


def test_dry_run_writes_nothing(image_folder, random_trunk, tmp_path, tiny, capsys):
    assert train(run_config(image_folder, random_trunk, tmp_path / "run"), tiny, dry_run=True) == {}
    plan = capsys.readouterr().out
    assert "12 training images, 2 for validation" in plan and "16x16 codes of 16" in plan
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "fields, error, message",
    [
        ({"resolution": 33}, ValueError, "resolution=33 is not a multiple of 2"),
        ({"resolution": 16}, ValueError, "resolution=16 is too small for LPIPS with validation_net='alex'.*31 pixels"),
        ({"resume_from_checkpoint": "latest"}, FileNotFoundError, "no checkpoint-N in"),
        ({"image_column": "label"}, ValueError, "'label' is not an image column"),
    ],
)
def test_bad_settings_write_nothing(image_folder, random_trunk, tmp_path, tiny, fields, error, message):
    with pytest.raises(error, match=message):
        train(run_config(image_folder, random_trunk, tmp_path / "run", **fields), tiny)
    assert not (tmp_path / "run").exists()


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
    sources = [file.read_text() for file in package.glob("*.py") if file.name != "configuration_training.py"]
    names = {field.name for field in dataclasses.fields(VQGANTrainingConfig)}
    assert {name for name in names if not any(f"config.{name}" in source for source in sources)} == set()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"train_batch_size": 0}, "train_batch_size=0 must be at least 1"),
        ({"l1_weight": -1.0}, "l1_weight=-1.0 must not be negative"),
        ({"adversarial_loss": "wasserstein"}, "adversarial_loss='wasserstein' must be one of"),
        ({"l1_weight": 0.0, "perceptual_weight": 0.0}, "are all 0"),
        ({"dataset_name": ""}, "dataset_name is empty"),
    ],
)
def test_impossible_values_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        VQGANTrainingConfig(**{"dataset_name": "x"} | fields)
