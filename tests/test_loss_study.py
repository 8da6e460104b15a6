"""The study of the losses: its statistics against closed forms, and a run of it that is small, whole and repeatable."""

import dataclasses
import math

import pytest
import torch
from conftest import photo
from studies.loss_study import (
    GAN,
    VARIANTS,
    Effect,
    LossStudyConfig,
    detail_kept,
    effect_cell,
    model_config,
    paired_effect,
    run_study,
    spread,
    training_config,
)

# ------------------------------------------------------------------------------------------------ what is noise


def test_interval_of_two_seeds_is_that_of_cauchy():
    """With one degree of freedom, t_p = tan(π (p - ½)), and sd / √2 is half the distance of the two differences."""
    effect = paired_effect([5.0, 9.0], [4.0, 6.0])  # differences 1 and 3
    margin = math.tan(math.pi * 0.475)
    assert (effect.mean, effect.low, effect.high) == pytest.approx((2, 2 - margin, 2 + margin))
    assert not effect.beyond_noise


def test_interval_of_three_seeds():
    """With two, t_p = (2p - 1) / √(2 p (1 - p)). What all variants of a seed share makes no difference."""
    shared = [100.0, -7.0, 0.5]
    effect = paired_effect([s + d for s, d in zip(shared, (1.0, 2.0, 3.0), strict=True)], shared)
    margin = 0.95 / math.sqrt(2 * 0.975 * 0.025) / math.sqrt(3)
    assert (effect.mean, effect.low, effect.high) == pytest.approx((2, 2 - margin, 2 + margin))
    near = paired_effect([s + d for s, d in zip(shared, (1.9, 2.0, 2.1), strict=True)], shared)
    assert not effect.beyond_noise and near.beyond_noise


def test_no_interval_without_spread():
    assert paired_effect([1.0], [3.0]) == Effect(-2.0, None, None)
    assert not paired_effect([1.0], [3.0]).beyond_noise
    assert not paired_effect([0.0, 0.0, 0.0], [0.0, 0.0, 0.0]).beyond_noise  # a measure that is 0 for everyone


@pytest.mark.parametrize(
    ("mean", "better", "mark"), [(1, "higher", "✓"), (1, "lower", "✗"), (-1, "higher", "✗"), (-1, "lower", "✓")]
)
def test_marks_say_which_way_is_better(mean, better, mark):
    assert effect_cell(Effect(mean, mean - 0.5, mean + 0.5), better).endswith(mark)
    assert "*" not in effect_cell(Effect(mean, mean - 2, mean + 2), better)


def test_spread_shows_as_many_digits_as_mean_something():
    assert spread([1.0, 1.1, 1.2]) == "1.10 ± 0.10"
    assert spread([140.0, 155.0, 170.0]) == "155 ± 15"
    assert spread([0.5]) == spread([0.5, 0.5]) == "0.5"


def test_detail_kept():
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert detail_kept(images, images) == pytest.approx(1)
    assert detail_kept(images / 2 + 0.3, images) == pytest.approx(0.25, rel=1e-4)  # an energy; brightness is none
    assert detail_kept(torch.nn.functional.avg_pool2d(images, 3, 1, 1), images) < 0.2


# ------------------------------------------------------------------------------------------------ the runs

DIFFERENCES = {
    "L1 + LPIPS": {"perceptual_weight"},
    GAN: {"adversarial_weight"},
    "GAN cut at z": {"adversarial_gradient_at_z"},
    "scale + rotate": {"equivariance_share"},  # which transforms, is the trainer's default
    "scale": {"equivariance_share", "equivariance_transforms"},
    "latent noise": {"latent_noise_std"},
    "token perturbation": {"perturbation_share"},
}


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.reference])
def test_variants_differ_in_one_respect(name):
    config = LossStudyConfig(dataset_name="-")

    def fields(name: str) -> dict:
        variant = VARIANTS[name]
        training = dataclasses.asdict(training_config(config, name, variant, seed=0))
        return training | model_config(config, variant).to_dict() | {"output_dir": None}

    own, reference = fields(name), fields(VARIANTS[name].reference)
    assert {key for key in own if own[key] != reference[key]} == DIFFERENCES[name]


def test_study_is_whole_and_repeatable(image_folder, random_trunk, tmp_path):
    for number in range(2, 8):
        photo(200 + number).save(image_folder / "validation" / f"{number:02d}.png")
    trunk = str(random_trunk / "alex.safetensors")
    config = LossStudyConfig(
        dataset_name=str(image_folder),
        output_dir=str(tmp_path / "study"),
        variants=["L1 + LPIPS"],
        seeds=[3],
        max_train_steps=2,
        train_batch_size=2,
        max_samples=8,
        num_vq_embeddings=16,
        perceptual_weights_path=trunk,
        other_net="alex",
        other_weights_path=trunk,
        measures=["dimension", "probe"],  # the images have no labels: the probe is left out
    )
    study = run_study(config)
    assert list(study["figures"]) == ["L1", "L1 + LPIPS"]
    table = study["figures"]["L1 + LPIPS"]
    assert {"psnr", "lpips", "other_lpips", "detail", "effective_dimension"} <= set(table)
    found = study["effects"]["L1 + LPIPS"]["psnr"]["mean"]
    assert found == pytest.approx(table["psnr"][0] - study["figures"]["L1"]["psnr"][0])
    folder = tmp_path / "study"
    assert "| effective dimension ↑ |" in (folder / "study.md").read_text()
    files = {file: file.stat().st_mtime_ns for file in folder.glob("*/*") if file.is_file()}
    assert {file.name for file in folder.glob("*.png")} == {
        "reconstructions.png",
        "interpolations.png",
        "gradients.png",
    }
    assert run_study(config) == study
    log_and_figures = [file for file in files if file.name in ("measured.json", "metrics.json", "model.safetensors")]
    assert all(file.stat().st_mtime_ns == files[file] for file in log_and_figures)
