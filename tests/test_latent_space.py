"""Measures of latent spaces, on toys whose figures are known, and the whole analysis on tiny models."""

import json
import math

import pytest
import torch
from conftest import TINY
from diffusers import AutoencoderKL

from hf_vqgan import VQGANConfig, VQGANModel
from hf_vqgan.evaluation.latent_analysis import GROUPS, LatentAnalysisConfig, analyze, analyze_and_compare
from hf_vqgan.evaluation.latent_report import compare, read_report
from hf_vqgan.measurement.latent_space import (
    TRANSFORMS,
    PixelDistance,
    bootstrap,
    equivariance_error,
    exchange_code,
    high_frequency_share,
    jump_share,
    kernel_distance,
    lerp,
    level_noise,
    linear_probe,
    local_lipschitz,
    nearest_codes,
    nearest_neighbours,
    neighbour_consistency,
    neighbour_midpoints,
    participation_ratio,
    path_length,
    path_steps,
    project,
    replace_tokens,
    shift_stability,
    slerp,
    spectral_slope,
    straightness,
    unchanged_share,
)

DISTANCE = PixelDistance()


def linear_decoder(matrix: torch.Tensor):
    """z `(B, 2, 3, 3)` to x `(B, 3, 4, 4)` by one matrix `(48, 18)`."""
    return lambda z: (z.flatten(1) @ matrix.T).view(-1, 3, 4, 4)


@pytest.fixture
def matrix() -> torch.Tensor:
    return torch.randn(48, 18, dtype=torch.float64)


@pytest.fixture
def ends() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 5, 2, 3, 3, dtype=torch.float64).unbind()


def test_a_linear_decoder_is_as_smooth_as_its_matrix(matrix, ends):
    start, end = ends
    decode, t = linear_decoder(matrix), torch.rand(5, dtype=torch.float64)
    speed = DISTANCE(decode(end), decode(start))  # straight and even: the whole way at t = 0 to 1
    assert torch.allclose(path_length(decode, DISTANCE, start, end, t, 1e-3, lerp), speed)
    lengths, chords = path_steps(decode, DISTANCE, start, end, 8, lerp)
    assert torch.allclose(lengths, speed.sqrt()[:, None].expand(5, 8) / 8)
    assert torch.allclose(straightness(lengths, chords), torch.ones(5, dtype=torch.float64))
    assert not jump_share(lengths).any()
    found = local_lipschitz(decode, start, iterations=200)
    assert torch.allclose(found, torch.linalg.svdvals(matrix)[0].expand(5), rtol=1e-6)


def test_lipschitz_is_local_and_per_image():
    """x = z² / 2 has the Jacobian diag(z), of norm max |z|, at every image its own."""
    latents = torch.tensor([[1.0, -3.0], [0.5, 0.1]], dtype=torch.float64).view(2, 1, 1, 2)
    assert torch.allclose(
        local_lipschitz(lambda z: z.square() / 2, latents, 100), torch.tensor([3.0, 0.5], dtype=torch.float64)
    )


def test_lipschitz_goes_through_attention(tiny_model):
    """The fused attention has no second derivative; against the Jacobian itself."""
    latents = torch.randn(2, 4, 2, 2)

    def decode(z):
        return tiny_model.decode(z, force_not_quantize=True).sample

    jacobian = torch.autograd.functional.jacobian(lambda z: decode(z).flatten(), latents[1:]).flatten(1)
    found = local_lipschitz(decode, latents, iterations=40)[1]
    assert found == pytest.approx(float(torch.linalg.svdvals(jacobian)[0]), rel=1e-3)


def test_a_decoder_that_ignores_its_latents_has_no_path(ends):
    def decode(z):
        return torch.ones(len(z), 3, 4, 4)

    assert not path_length(decode, DISTANCE, *ends, torch.rand(5), 1e-2).any()
    lengths, chords = path_steps(decode, DISTANCE, *ends, 4)
    assert straightness(lengths, chords).isnan().all() and not jump_share(lengths).any()


def test_leaps_and_detours_show(matrix, ends):
    """Rounding makes one leap of a way that crosses one boundary; a hole half-way bends it."""
    start, end = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    lengths, chords = path_steps(torch.round, DISTANCE, start, end, 10, lerp)
    assert jump_share(lengths).item() == pytest.approx(0.1) and straightness(lengths, chords).item() == 1

    smooth = linear_decoder(matrix)

    def holed(z):  # the middle of two latents of length 1 at a right angle is shorter: nobody has been there
        return torch.where((z.flatten(1).norm(dim=1) < 0.8).view(-1, 1, 1, 1), 30.0, smooth(z))

    flat = torch.linalg.qr(ends[0].flatten(1).T).Q.T.view_as(ends[0])
    start, end = flat[:4], flat[1:]
    figures = [straightness(*path_steps(decode, DISTANCE, start, end, 16, lerp)) for decode in (smooth, holed)]
    assert (figures[1] < 0.8 * figures[0]).all()


def test_slerp_keeps_lengths_and_meets_its_ends():
    start, end = torch.randn(2, 6, 4, 4, 4, dtype=torch.float64).unbind()
    start, end = (z / z.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for z in (start, end))
    for t in (0.0, 0.3, 0.5, 1.0):
        at = slerp(start, end, torch.full((6,), t, dtype=torch.float64))
        assert torch.allclose(at.flatten(1).norm(dim=1), torch.ones(6, dtype=torch.float64))
    assert torch.allclose(at, end)
    t = torch.linspace(0, 1, 6, dtype=torch.float64)
    assert torch.allclose(slerp(start, 2 * start, t), lerp(start, 2 * start, t))  # no angle to go along
    quarter = slerp(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([1 / 3]))
    assert torch.allclose(quarter, torch.tensor([[math.cos(math.pi / 6), 0.5]]))


def test_nearest_neighbours_and_codes_are_those_of_all_distances():
    latents = torch.randn(23, 3, 2, 2)
    distances = torch.cdist(latents.flatten(1), latents.flatten(1)).fill_diagonal_(torch.inf)
    assert torch.equal(nearest_neighbours(latents, chunk=5), distances.argmin(dim=1))
    codebook, numbers = torch.randn(40, 6), torch.tensor([7, 0, 39])
    distances = torch.cdist(codebook, codebook).fill_diagonal_(torch.inf)
    assert torch.equal(nearest_codes(codebook, numbers, 4, max_scores=50), distances[numbers].argsort(dim=1)[:, :4])


def test_holes_between_latents_are_found():
    """A decoder that is right at its latents only: reconstructions agree, the ways between show it."""
    angles = torch.arange(64) * (2 * math.pi / 64)
    latents = torch.stack([angles.cos(), angles.sin()], dim=1).double()[:, :, None, None]

    def holed(z):
        on_data = torch.cdist(z.flatten(1), latents.flatten(1)).min(dim=1).values < 1e-6
        return torch.where(on_data[:, None, None, None], z, 2 * z)

    def smooth(z):
        return z

    real, between = latents.flatten(1), neighbour_midpoints(latents)
    distances = {
        decode: [kernel_distance(real, decode(z).flatten(1)) for z in (latents, between)] for decode in (smooth, holed)
    }
    assert distances[smooth][0] == distances[holed][0] == 0
    assert abs(distances[smooth][1]) < 1e-3 < 0.1 < distances[holed][1]


def test_kernel_distance_is_the_mean_over_pairs_and_unbiased():
    a, b = torch.randn(2, 7, 3, dtype=torch.float64).unbind()

    def kernel(x, y):
        return (x @ y / 3 + 1) ** 3

    pairs = [(i, j) for i in range(7) for j in range(7) if i != j]
    expected = sum(kernel(a[i], a[j]) + kernel(b[i], b[j]) - kernel(a[i], b[j]) - kernel(a[j], b[i]) for i, j in pairs)
    assert kernel_distance(a, b) == pytest.approx(float(expected) / 42)
    draws = torch.tensor([kernel_distance(*torch.randn(2, 10, 3).unbind()) for _ in range(400)])
    assert abs(draws.mean()) < 3 * draws.std() / 20
    assert kernel_distance(a, a) == 0


def test_projection_keeps_mean_distances():
    features = torch.randn(200, 64, dtype=torch.float64)
    projected = project(features, 16)
    assert projected.shape == (200, 16) and project(features, 64) is features
    ratio = torch.pdist(projected).square().mean() / torch.pdist(features).square().mean()
    assert ratio == pytest.approx(1, abs=0.1)
    assert torch.equal(projected, project(features, 16))  # the same directions every time


@pytest.mark.parametrize("share", [0.1, 1.0])
def test_replaced_tokens_are_near_and_as_many_as_said(share):
    codebooks = [torch.randn(30, 4), torch.randn(30, 4)]
    indices = torch.randint(30, (3, 5, 4, 2))
    before = indices.clone()
    found = replace_tokens(indices, codebooks, share, 3, torch.Generator().manual_seed(0))
    assert torch.equal(indices, before)
    for column, codebook in enumerate(codebooks):
        own, replaced = indices[..., column], found[..., column]
        assert ((own != replaced).flatten(1).sum(dim=1) == round(share * 20)).all()
        near = nearest_codes(codebook, torch.arange(30), 3)
        assert ((near[own] == replaced[..., None]).any(dim=-1) | (own == replaced)).all()


def test_shift_stability_of_patch_codes():
    """An encoder of separate patches follows whole strides exactly; columns of colour notice one pixel to the right."""

    def encode_indices(pixels):
        return (pixels[:, 0, ::4, ::4] * 100).round().long()[..., None]

    columns = (torch.arange(16) / 16).expand(2, 3, 16, 16)
    assert shift_stability(encode_indices, torch.rand(2, 3, 16, 16), 4, 4).tolist() == [1, 1]
    assert shift_stability(encode_indices, columns, 1, 4).tolist() == [0.5, 0.5]  # none to the right, all downwards


def test_noise_is_one_level():
    pixels = torch.rand(2, 3, 8, 8) * 1.9 - 0.95
    levels = ((level_noise(pixels, torch.Generator()) - pixels) * 127.5).abs()
    assert torch.allclose(levels, torch.ones_like(levels), atol=1e-3)
    assert level_noise(torch.ones(1, 3, 8, 8), torch.Generator()).max() == 1
    assert unchanged_share(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 0], [3, 4]])).tolist() == [0.5, 1]


def test_codes_that_look_as_they_lie():
    codebook, codes = torch.randn(12, 1), torch.arange(12)
    context = torch.zeros(1, 3, 3, 1, dtype=torch.int64)

    def measure(looks):
        images = looks[exchange_code(context, 1, 2, codes)[..., 0]].permute(0, 3, 1, 2).expand(-1, 3, -1, -1)
        return neighbour_consistency(DISTANCE, images, codebook[codes], chunk=5)

    assert measure(3 * codebook) == pytest.approx(1)
    assert abs(measure(torch.randn(12, 1))) < 0.5  # names that say nothing
    assert math.isnan(measure(torch.zeros(12, 1)))


def test_equivariance_error_of_known_encoders():
    pixels = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    mix = torch.randn(2, 3, dtype=torch.float64)
    ramp = torch.arange(8, dtype=torch.float64).expand(8, 8)

    def pointwise(x):
        return torch.einsum("dc,bchw->bdhw", mix, x)

    def tied_to_places(x):
        return pointwise(x) + ramp[: x.shape[2], : x.shape[3]]

    for transform in TRANSFORMS.values():
        assert equivariance_error(pointwise, pixels, pointwise(pixels), transform, 1.0).max() < 1e-12
    expected = (ramp - ramp.flip(1)).square().mean().sqrt() / 2
    found = equivariance_error(tied_to_places, pixels, tied_to_places(pixels), TRANSFORMS["flip"], 2.0)
    assert torch.allclose(found, expected.expand(4))


def test_spectra_of_known_fields():
    rows = torch.arange(16.0)
    slow, fast = (torch.cos(2 * math.pi * f * rows).expand(1, 1, 16, 16) for f in (1 / 16, 0.5))
    assert high_frequency_share(slow).item() == pytest.approx(0, abs=1e-9)
    assert high_frequency_share(fast).item() == pytest.approx(1)
    both = high_frequency_share(5 + 3 * slow + fast)  # the mean of cos² is ½, but 1 at Nyquist
    assert both.item() == pytest.approx(1 / (1 + 9 / 2))
    noise = torch.randn(200, 1, 32, 32, dtype=torch.float64)
    assert high_frequency_share(noise).mean().item() == pytest.approx(1 - math.pi / 16, abs=0.02)
    # The logarithm of a ring of few modes is low on average, which tilts single fields a little.
    assert spectral_slope(noise).mean().item() == pytest.approx(0, abs=0.1)
    frequency = (torch.fft.fftfreq(32)[:, None].square() + torch.fft.fftfreq(32).square()).sqrt()
    frequency[0, 0] = 1
    pink = torch.fft.ifft2(torch.fft.fft2(noise) / frequency).real
    assert spectral_slope(pink).mean().item() == pytest.approx(-2, abs=0.2)


def test_participation_ratio():
    assert participation_ratio(torch.eye(7)) == pytest.approx(7)
    assert participation_ratio(torch.diag(torch.tensor([4.0, 0, 0]))) == pytest.approx(1)
    assert participation_ratio(torch.diag(torch.tensor([2.0, 1.0]))) == pytest.approx(9 / 5)


def test_linear_probe_finds_what_is_there_and_nothing_else():
    labels = torch.arange(60) % 3
    there = torch.eye(3)[labels] + 0.05 * torch.randn(60, 3)
    assert linear_probe(there, labels).mean() == 1
    # More features than images, none of them about the class: any score much above a third would be a leak.
    assert linear_probe(torch.randn(60, 300), labels).mean() < 0.6
    assert linear_probe(torch.eye(60), labels).mean() < 0.6  # can only be learnt by heart


def test_bootstrap_intervals():
    values = torch.randn(400, dtype=torch.float64)
    value, low, high = bootstrap(lambda rows: rows.mean(), values)
    assert value == pytest.approx(float(values.mean()))
    assert high - low == pytest.approx(2 * 1.96 / 20 * float(values.std()), rel=0.1)

    def distinct(rows):  # a statistic that every resampling changes in the same direction
        return len(rows.unique())

    assert bootstrap(distinct, values)[2] < 300 < 400 == bootstrap(distinct, values)[0]
    value, low, high = bootstrap(distinct, values, recentre=True)
    assert low <= value <= high
    correct = torch.tensor([1.0] * 14 + [0.0])
    assert bootstrap(lambda rows: rows.mean(), correct)[2] <= 1  # a share stays one


# ---------------------------------------------------------------------------------------------------------------------
# The whole analysis


@pytest.fixture
def small_analysis(random_trunk, tmp_path):
    """A config for models of 32 pixels and the 12 training images of `image_folder`."""
    return dict(
        output_dir=str(tmp_path / "out"),
        split="train",
        resolution=32,
        perceptual_weights_path=str(random_trunk / "alex.safetensors"),
        path_steps=3,
        lipschitz_images=2,
        lipschitz_iterations=2,
        consistency_contexts=2,
        consistency_codes=4,
        diffusion_steps=2,
    )


def test_analysis_leaves_figures_and_pictures(tiny_model, image_folder, small_analysis, tmp_path):
    tiny_model.config.scaling_factor = 0.8
    tiny_model.save_pretrained(tmp_path / "model")
    config = LatentAnalysisConfig(**small_analysis, measures=list(GROUPS))
    report = analyze(str(tmp_path / "model"), str(image_folder), config)
    files = {file.name for file in (tmp_path / "out").iterdir()}
    pictures = {"interpolations.png", "neighbourhoods.png", "principal_colours.png", "walk.gif"}
    assert files == {"latent_space.json", "report.md"} | pictures
    assert read_report(tmp_path / "out") == json.loads(json.dumps(report))
    figures = {name: entry for name, entry in report.items() if isinstance(entry, dict) and "value" in entry}
    for name, figure in figures.items():
        assert figure["low"] <= figure["value"] <= figure["high"], name
        assert figure["unit"] and figure["protocol"] and figure["better"] in ("higher", "lower", None), name
    wanted = ("perceptual_path_length_quantized", "lipschitz", "ifid", "pfid", "token_robustness",
              "index_stability_stride_shift", "code_neighbour_consistency", "equivariance_scale", "effective_dimension",
              "latent_high_frequency_share", "diffusion_loss", "gfid")  # fmt: skip
    assert not set(wanted) - figures.keys()
    assert report["skipped"] == {"probe": "there are no two classes with five images each: more --max_samples"}
    assert report["settings"]["feature_extractor"] == "lpips_alex"
    # The model's own scaling factors are as before the diffusion was trained.
    assert VQGANModel.from_pretrained(tmp_path / "model").config.scaling_factor == 0.8

    quick = LatentAnalysisConfig(**small_analysis, measures=["robustness", "smoothness"])
    again = analyze(str(tmp_path / "model"), str(image_folder), quick)
    for name in ("token_robustness", "path_straightness_quantized", "pfid"):  # what else is measured changes nothing
        assert again[name]["value"] == pytest.approx(report[name]["value"], rel=1e-4)


def test_models_of_every_kind_are_compared(image_folder, small_analysis, tmp_path):
    """Several codebooks, and a diffusers AutoencoderKL, which has no codes; and figures that must not meet do not."""
    torch.manual_seed(0)
    VQGANModel(VQGANConfig(**TINY, quantizer="residual", num_codebooks=3)).save_pretrained(tmp_path / "residual")
    AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=32,
    ).save_pretrained(tmp_path / "kl")
    groups = ["smoothness", "holes", "robustness", "codes"]
    config = LatentAnalysisConfig(**small_analysis, measures=groups, compare=[str(tmp_path / "kl")])
    analyze_and_compare(str(tmp_path / "residual"), str(image_folder), config)
    out = tmp_path / "out"
    assert {"comparison.png", "comparison.md", "latent_space.json"} <= {file.name for file in out.iterdir()}
    reports = {"residual": read_report(out), "kl": read_report(out / "kl")}
    assert "pfid" in reports["residual"] and reports["kl"]["skipped"]["robustness"] == "the model has no codes"
    table = (out / "comparison.md").read_text()
    assert "| ifid | lower |" in table and "Not of all models:" in table and "pfid" in table.splitlines()[-1]

    reports["kl"]["settings"]["feature_extractor"] = "inception"
    with pytest.raises(
        ValueError, match="residual and kl cannot be compared: feature_extractor is 'lpips_alex' there and 'inception'"
    ):
        compare(reports, out)
    reports["kl"]["settings"] = reports["residual"]["settings"]
    reports["kl"]["ifid"]["protocol"]["projections"] = 2
    with pytest.raises(ValueError, match="cannot be compared: ifid: projections is 4 there and 2 here"):
        compare(reports, out)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"measures": ["smothness"]}, "measures=.'smothness'. must be one of smoothness"),
        ({"replaced_share": 0.0}, "replaced_share=0.0"),
        ({"max_samples": 4}, "max_samples=4 must be at least 8"),
        ({"resolution": 33}, "resolution=33 must be a multiple of f=2"),
        ({"split": "validation"}, "2 readable images; 8 or more"),
        ({"split": "val"}, "has no split 'val'; it has train, validation"),
        ({"label_column": "class"}, "'class' is not a column; columns: image"),
        ({"feature_extractor": "inception", "inception_weights_path": "nowhere.pth"}, "no file at 'nowhere.pth'"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_written(
    tiny_model, image_folder, small_analysis, tmp_path, changed, message
):
    tiny_model.save_pretrained(tmp_path / "model")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        config = LatentAnalysisConfig(**small_analysis | changed)
        analyze(str(tmp_path / "model"), str(image_folder), config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [0.0, 0.1, float("nan")])
def test_latents_that_do_not_vary_are_an_error(tiny_model, image_folder, small_analysis, tmp_path, value):
    """Channels of different constants have a standard deviation over all numbers, but nothing to divide by."""
    with torch.no_grad():
        tiny_model.quant_conv.weight.zero_()
        tiny_model.quant_conv.bias.copy_(torch.arange(4.0) * 0.3 + value)
    tiny_model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="have the same value at every position"):
        analyze(str(tmp_path / "model"), str(image_folder), LatentAnalysisConfig(**small_analysis))
    assert not (tmp_path / "out").exists()


def test_the_only_split_is_said_to_be_it(tiny_model, image_folder, small_analysis, tmp_path, caplog):
    """Train is no longer taken without a word."""
    tiny_model.save_pretrained(tmp_path / "model")
    config = LatentAnalysisConfig(**small_analysis | {"split": None}, measures=["dimension"])
    report = analyze(str(tmp_path / "model"), str(image_folder / "train"), config)
    note = "these are images of 'train', its only split"
    assert note in caplog.text and note in report["split_note"] and note in (tmp_path / "out" / "report.md").read_text()


def test_every_figure_can_be_told_in_words(tiny_model, image_folder, small_analysis, tmp_path):
    """Each measure's definition finds the settings it names in the measure's protocol."""
    tiny_model.save_pretrained(tmp_path / "model")
    config = LatentAnalysisConfig(**small_analysis, measures=["smoothness", "robustness", "codes", "equivariance"])
    report = analyze(str(tmp_path / "model"), str(image_folder), config)
    told = (tmp_path / "out" / "report.md").read_text().partition("## What was done")[2]
    assert "- pfid: replaced 10% of the tokens, each by one of its 8 nearest codes; features: lpips_alex" in told
    assert all(f"- {name}: " in told for name, entry in report.items() if isinstance(entry, dict) and "value" in entry)
