import math

import pytest
import torch
from conftest import smooth_pixels
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchmetrics.image import PeakSignalNoiseRatio

from hf_vqgan.measurement import metrics
from hf_vqgan.measurement.metrics import (
    CodebookHealth,
    evaluate_reconstruction,
    measure_latents,
    perplexity,
    pixel_figures,
)


def test_perplexity_closed_forms():
    assert perplexity(torch.zeros(8)) == 0
    assert perplexity(torch.tensor([0, 5, 0])) == 1
    assert perplexity(torch.full((8,), 3)) == pytest.approx(8)
    p = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    assert perplexity(torch.tensor([2, 1, 1])) == pytest.approx(math.exp(-(p * p.log()).sum()))


def test_health_counts_the_window_only():
    health = CodebookHealth(num_codes=6, window=2)
    for step in ([0, 0, 1], [2, 2, 2], [2, 3, 3]):
        health.update(torch.tensor(step).view(1, 1, -1))
    assert health.counts.tolist() == [0, 0, 4, 2, 0, 0]
    assert health.age.tolist() == [2, 2, 0, 0, 3, 3]  # 4 and 5 were never hit
    report = health.report()
    assert (report.usage, report.dead_codes, report.oldest_code) == (pytest.approx(2 / 6), 4, 3)
    assert (report.window_steps, report.positions) == (2, 6)
    assert report.top_code_share == pytest.approx(4 / 6)
    assert report.perplexity == pytest.approx(perplexity(torch.tensor([4, 2])))


def test_health_state_survives_a_checkpoint(tmp_path):
    health, restored = CodebookHealth(6, window=2), CodebookHealth(6, window=2)
    for step in ([0, 1], [2, 2]):
        health.update(torch.tensor(step).view(1, 1, -1))
    torch.save(health.state_dict(), tmp_path / "state.pt")
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for each in (health, restored):
        each.update(torch.tensor([[[5, 5]]]))
    assert restored.report() == health.report()


def test_several_codebooks_have_a_histogram_each():
    health = CodebookHealth(num_codes=4, num_codebooks=2, window=5)
    health.update(torch.tensor([[[[0, 3], [1, 3], [2, 3], [3, 3]]]]))
    assert health.counts.tolist() == [1, 1, 1, 1, 0, 0, 0, 4]
    report = health.report()
    assert (report.perplexity, report.usage, report.positions) == (pytest.approx((4 + 1) / 2), 5 / 8, 4)
    assert report.top_code_share == 1


def test_collapse_is_diagnosed_with_its_remedies():
    health = CodebookHealth(num_codes=100, window=3)
    for _ in range(2):
        health.update(torch.zeros(1, 20, 20, dtype=torch.int64))
        assert health.diagnosis() is None  # the window has not filled yet
    health.update(torch.zeros(1, 20, 20, dtype=torch.int64))
    assert "has collapsed: perplexity 1.0 of 100 possible" in health.diagnosis()
    assert "--quantizer vq_ema" in health.diagnosis()

    health = CodebookHealth(num_codes=100, window=1)
    for codes, problem in ((100, None), (60, None), (40, "is shrinking: perplexity 40.0, 100.0 before")):
        health.update(torch.arange(codes).view(1, 1, -1))
        found = health.diagnosis()
        assert (found is None) == (problem is None) and (problem or "") in (found or "")


def test_empty_health_and_bad_window():
    assert CodebookHealth(4).report().perplexity == 0
    with pytest.raises(ValueError, match="window=0"):
        CodebookHealth(4, window=0)


def test_psnr_and_ssim_are_scikit_images():
    real = torch.stack([smooth_pixels(seed, 48, 40) for seed in range(3)])
    sample = (real + 0.2 * torch.randn_like(real)).clamp(-1, 1)
    found = pixel_figures(sample, real)
    for number in range(3):
        ours, theirs = (x[number].permute(1, 2, 0).double().numpy() / 2 + 0.5 for x in (sample, real))
        assert float(found["psnr"][number]) == pytest.approx(
            peak_signal_noise_ratio(theirs, ours, data_range=1), abs=1e-4
        )
        expected = structural_similarity(
            theirs, ours, data_range=1, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert float(found["ssim"][number]) == pytest.approx(expected, abs=1e-4)
    assert pixel_figures(real, real)["psnr"].tolist() == [100] * 3


def test_reconstruction_figures_are_means_over_images(tiny_model):
    """Per image, then averaged: the same for any batch size, and equal to the reference on [0, 1] images."""
    images = torch.rand(6, 3, 32, 32) * 2 - 1
    reports = [evaluate_reconstruction(tiny_model, images.split(size)) for size in (1, 4, 6)]
    assert reports[0].as_dict() == pytest.approx(reports[1].as_dict(), rel=1e-4)
    assert reports[0].as_dict() == pytest.approx(reports[2].as_dict(), rel=1e-4)
    with torch.no_grad():
        sample = tiny_model(images).sample.clamp(-1, 1) / 2 + 0.5
    psnr = PeakSignalNoiseRatio(data_range=1.0, dim=(1, 2, 3), reduction="elementwise_mean")
    assert reports[0].psnr == pytest.approx(float(psnr(sample, images / 2 + 0.5)), abs=1e-4)
    ssim = pixel_figures(sample * 2 - 1, images)["ssim"].mean()
    assert reports[0].ssim == pytest.approx(float(ssim), abs=1e-6)
    assert reports[0].num_images == 6 and "lpips" not in reports[0].as_dict()


def test_nothing_to_evaluate(tiny_model):
    with pytest.raises(ValueError, match="no images"):
        evaluate_reconstruction(tiny_model, [])
    assert not tiny_model.training


def test_latent_statistics(tiny_model):
    batches = [torch.rand(size, 3, 16, 16) for size in (4, 4, 3)]
    found = measure_latents(tiny_model, batches.__getitem__, len(batches))
    with torch.no_grad():
        latents = torch.cat([tiny_model.encode(batch).latents for batch in batches]).double()
    assert found.num_images == 11
    assert found.mean == pytest.approx(float(latents.mean()), rel=1e-12)
    assert found.std == pytest.approx(float(latents.std(correction=0)), rel=1e-12)
    channels = latents.transpose(0, 1).flatten(1)
    assert found.channel_means == pytest.approx(channels.mean(dim=1).tolist(), rel=1e-12)
    assert found.channel_stds == pytest.approx(channels.std(dim=1, correction=0).tolist(), rel=1e-12)


@pytest.mark.parametrize("value", [0.0, 7.7, 99.9, 123.4])
def test_constant_latents_have_no_deviation(tiny_model, value):
    """Not the root of a negative number: rounding takes Σz² / n below the mean's square."""
    torch.nn.init.zeros_(tiny_model.quant_conv.weight)
    torch.nn.init.constant_(tiny_model.double().quant_conv.bias, value)
    found = measure_latents(tiny_model, lambda number: torch.rand(3, 3, 16, 16), 7)
    assert found.mean == pytest.approx(value) and 0 <= found.std <= 1e-6 * value


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_latent_statistics_do_not_depend_on_the_number_of_processes(tiny_model, monkeypatch, processes):
    batches = [torch.rand(2, 3, 16, 16) for _ in range(4)]
    alone = measure_latents(tiny_model, batches.__getitem__, 4)
    tables = []
    monkeypatch.setattr(metrics.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(metrics.dist, "get_world_size", lambda: processes)
    for rank in range(processes):
        monkeypatch.setattr(metrics.dist, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(metrics.dist, "all_reduce", lambda table: tables.append(table.clone()))
        measure_latents(tiny_model, batches.__getitem__, 4)
    monkeypatch.setattr(metrics.dist, "all_reduce", lambda table: table.copy_(sum(tables)))
    assert measure_latents(tiny_model, batches.__getitem__, 4) == alone
