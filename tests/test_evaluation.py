import io
import json

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import package_lpips, photo, smooth_pixels
from diffusers import AutoencoderKL
from huggingface_hub import ModelCard, constants
from PIL import Image
from torch_fidelity import feature_extractor_inceptionv3
from torch_fidelity.metric_isc import isc_features_to_metric

from hf_vqgan import VQGANModel
from hf_vqgan.evaluation.autoencoders import load_autoencoder
from hf_vqgan.evaluation.comparison import EvaluationConfig, evaluate
from hf_vqgan.evaluation.image_codecs import encode_near, payload_bytes
from hf_vqgan.evaluation.timing import peak_memory
from hf_vqgan.losses.image_losses import LPIPS
from hf_vqgan.measurement import metrics
from hf_vqgan.measurement.frechet import FeatureMoments, InceptionFeatures, frechet_distance, inception_score, to_bytes
from hf_vqgan.measurement.metrics import pixel_figures

QUICK = dict(resolution=32, lpips=[], inception=False, anchors=["none"])


def moments(features: torch.Tensor) -> FeatureMoments:
    found = FeatureMoments(features.shape[1])
    found.update(features)
    return found


def distance_from_rows(first: torch.Tensor, second: torch.Tensor) -> float:
    """The distance from equally many rows, where (Σ₁Σ₂)^½ has the trace |X₁X₂ᵀ|_* / (n - 1) of the centred rows."""
    means, first, second = first.mean(0) - second.mean(0), first - first.mean(0), second - second.mean(0)
    traces = (first.square().sum() + second.square().sum()) / (len(first) - 1)
    return float(
        means.square().sum() + traces - 2 * torch.linalg.matrix_norm(first @ second.T, "nuc") / (len(first) - 1)
    )


def test_frechet_distance_is_scipys():
    first = torch.randn(200, 48, dtype=torch.float64) @ torch.randn(48, 48, dtype=torch.float64)
    second = first[:150] * 1.2 + 0.3 * torch.randn(150, 48, dtype=torch.float64) + 0.1
    rows = [x.numpy() for x in (first, second)]
    (mean, covariance), (other_mean, other) = ((x.mean(0), np.cov(x, rowvar=False)) for x in rows)
    root = scipy.linalg.sqrtm(covariance @ other).real
    expected = np.square(mean - other_mean).sum() + np.trace(covariance + other - 2 * root)
    assert frechet_distance(moments(first), moments(second)) == pytest.approx(float(expected), rel=1e-9)


def test_frechet_distance_with_fewer_images_than_features():
    first, second = torch.rand(2, 12, 96, dtype=torch.float64)
    found = frechet_distance(moments(first), moments(second))
    assert found == pytest.approx(distance_from_rows(first, second), rel=1e-6)
    assert frechet_distance(moments(first), moments(first)) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="two images or more, and there are 1"):
        frechet_distance(moments(first[:1]), moments(second))


def test_moments_of_processes_add_up(monkeypatch):
    features = torch.randn(30, 7) + 5
    parts = [moments(part) for part in features.split([4, 26])]
    sums = iter([sum(getattr(part, name) for part in parts) for name in ("count", "sum", "outer")])
    monkeypatch.setattr(metrics.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(metrics.dist, "all_reduce", lambda tensor: tensor.copy_(next(sums)))
    mean, covariance = parts[0].over_processes(torch.device("cpu")).gaussian()
    torch.testing.assert_close(mean, features.double().mean(0))
    torch.testing.assert_close(covariance, features.double().T.cov())
    assert parts[0].count == 4  # its own share is still its own


def test_inception_score_is_torch_fidelitys():
    logits = 3 * torch.randn(57, 20)
    expected = isc_features_to_metric(logits)
    mean, deviation = inception_score(logits)
    assert mean == pytest.approx(expected["inception_score_mean"], rel=1e-9)
    assert deviation == pytest.approx(expected["inception_score_std"], rel=1e-9)
    with pytest.raises(ValueError, match="10 parts needs as many images, and there are 9"):
        inception_score(logits[:9])


@pytest.fixture(scope="session")
def random_inception(tmp_path_factory):
    """A file as torch-fidelity's, with random weights that keep activations alive."""
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *args, **options: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda self, weights: None)
        network = feature_extractor_inceptionv3.FeatureExtractorInceptionV3("random", ["2048"])
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    torch.save(network.state_dict(), file)
    return file


@pytest.mark.parametrize("folder, split, warned", [("", None, True), ("", "train", False), ("test", None, False)])
def test_images_that_models_may_have_been_trained_on(tiny_model, tmp_path, caplog, folder, split, warned):
    """The only split is taken where there is no other, which is said at once and in the report."""
    (tmp_path / "images" / folder).mkdir(parents=True)
    photo(0, (32, 32)).save(tmp_path / "images" / folder / "0.png")
    tiny_model.save_pretrained(tmp_path / "model")
    config = EvaluationConfig(**QUICK, split=split, output_dir=str(tmp_path / "out"))
    result = evaluate([str(tmp_path / "model")], str(tmp_path / "images"), config)
    note = "these are images of 'train', its only split"
    assert [note in record.message for record in caplog.records] == [True] * warned
    assert (note in str(result["protocol"]["split_note"])) == warned
    assert (note in (tmp_path / "out" / "evaluation.md").read_text().split("## Protocol")[0]) == warned


@pytest.mark.filterwarnings("ignore::UserWarning")  # torchvision's, about how lpips builds its networks
def test_figures_are_those_of_the_reference_libraries(
    tiny_model, tmp_path, random_trunk, random_inception, monkeypatch
):
    """The whole chain, from files to evaluation.json, against the libraries on the same images."""
    monkeypatch.setattr(feature_extractor_inceptionv3.FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", 75)  # for speed
    (tmp_path / "images").mkdir()
    for number in range(10):
        photo(number, (32, 32)).save(tmp_path / "images" / f"{number}.png")
    tiny_model.save_pretrained(tmp_path / "model")
    config = EvaluationConfig(
        output_dir=str(tmp_path / "out"),
        resolution=32,
        lpips=["alex"],
        alex_weights_path=str(random_trunk / "alex.safetensors"),
        inception_weights_path=str(random_inception),
        anchors=["none"],
        update_model_card=True,
    )
    evaluate([str(tmp_path / "model")], str(tmp_path / "images"), config)
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["skipped"] == {} and found["protocol"]["split"] == "train"

    pixels = torch.stack([torch.tensor(np.array(photo(number, (32, 32)))) for number in range(10)])
    pixels = pixels.permute(0, 3, 1, 2)
    with torch.no_grad():
        output = tiny_model(pixels.float() / 127.5 - 1)
        sample = output.sample.clamp(-1, 1)
        theirs = package_lpips(LPIPS("alex", str(random_trunk / "alex.safetensors")))
        expected = theirs(sample, pixels.float() / 127.5 - 1).mean()
        assert found["lpips"] == found["lpips_alex"] == pytest.approx(float(expected), abs=1e-4)
        inception = feature_extractor_inceptionv3.FeatureExtractorInceptionV3(
            "random", ["2048", "logits_unbiased"], str(random_inception)
        )
        (real, _), (made, logits) = inception(pixels), inception(to_bytes(sample))
    distance = distance_from_rows(real.double(), made.double())
    assert found["rfid"] == pytest.approx(distance, rel=1e-4) and distance > 1e-3
    assert found["ris"] == pytest.approx(isc_features_to_metric(logits)["inception_score_mean"], rel=1e-4)
    counts = torch.bincount(output.indices.flatten(), minlength=16)
    assert found["perplexity"] == pytest.approx(metrics.perplexity(counts), rel=1e-6)
    assert found["usage"] == float((counts > 0).double().mean())
    assert found["bits_per_pixel"] == 4 / 2**2

    assert f"{found['rfid']:.3f}" in (tmp_path / "model" / "README.md").read_text()
    table = (tmp_path / "out" / "evaluation.md").read_text()
    assert f"| model | 1.0000 | {found['psnr']:.2f} |" in table and found["protocol"]["pixels_sha256"] in table


def test_models_of_every_kind_side_by_side(tiny_model, image_folder, tmp_path):
    tiny_model.config.norm_num_groups = 4
    tiny_model.save_pretrained(tmp_path / "ours")
    tiny_model.to_diffusers().save_pretrained(tmp_path / "theirs")
    kl = AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    kl.save_pretrained(tmp_path / "kl")
    names = [str(tmp_path / name) for name in ("ours", "theirs", "kl")]
    config = EvaluationConfig(**QUICK | {"anchors": ["jpeg", "webp"]}, output_dir=str(tmp_path / "out"))
    ours, theirs, continuous = evaluate(names, str(image_folder), config)["models"]
    for name in ("psnr", "ssim", "perplexity", "usage", "bits_per_pixel"):
        assert theirs[name] == pytest.approx(ours[name], rel=1e-5)
    assert [continuous[name] for name in ("perplexity", "usage", "bits_per_pixel")] == [None] * 3
    with torch.no_grad():
        pixels = torch.stack([smooth_pixels(100 + number, 32, 40) for number in range(2)])[..., 4:36]
        sample = kl.decode(kl.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
    assert continuous["psnr"] == pytest.approx(float(pixel_figures(sample, pixels)["psnr"].mean()), abs=0.05)
    with Image.open(tmp_path / "out" / "comparison.png") as picture:
        assert picture.width == 6 * 160 + 5 * 4  # original, three models, two codecs


def test_codecs_come_as_close_to_the_bits_as_they_can():
    image = photo(3, (64, 48))
    for codec, lowest in (("jpeg", 1), ("webp", 0)):
        sizes = {}
        for quality in range(lowest, 101):
            buffer = io.BytesIO()
            image.save(buffer, codec, quality=quality)
            sizes[quality] = 8 * payload_bytes(buffer.getvalue(), codec)
        for bits in (sizes[40], (sizes[60] + sizes[61]) / 2, 10**6):
            coded = encode_near(image, codec, bits)
            assert (coded.shrink, sizes[coded.quality]) == (1, coded.bits)
            nearest = min(abs(size - bits) for size in sizes.values())
            assert abs(coded.bits - bits) <= max(nearest, 0.02 * bits)  # sizes do not quite grow with the quality
        coded = encode_near(image, codec, sizes[lowest] / 2)
        assert coded.shrink > 1 and coded.bits < sizes[lowest] and coded.image.size == image.size
        assert encode_near(image, codec, 1).quality == lowest


def test_what_is_counted_as_payload():
    buffer = io.BytesIO()
    photo(1).save(buffer, "JPEG", quality=50)
    data = buffer.getvalue()
    comment = b"\xff\xfe\x00\x06text"
    assert payload_bytes(data[:2] + comment + data[2:], "jpeg") == payload_bytes(data, "jpeg") < len(data) - 500
    buffer = io.BytesIO()
    photo(1).save(buffer, "WebP", quality=50)
    data = buffer.getvalue()
    chunk = int.from_bytes(data[16:20], "little")
    assert chunk <= payload_bytes(data, "webp") <= chunk + 1  # padded to an even length


def test_small_and_unreadable_images_are_counted(tiny_model, image_folder, tmp_path, caplog):
    photo(0, (20, 30)).save(image_folder / "validation" / "02.png")
    (image_folder / "validation" / "03.png").write_bytes(b"not an image")
    tiny_model.save_pretrained(tmp_path / "model")
    config = EvaluationConfig(**QUICK, output_dir=str(tmp_path / "out"))
    protocol = evaluate([str(tmp_path / "model")], str(image_folder), config)["protocol"]
    assert [protocol[f"{kind}_images"] for kind in ("num", "enlarged", "unreadable")] == [3, 1, 1]
    assert "03.png" in caplog.text
    for number in range(3):
        (image_folder / "validation" / f"{number:02d}.png").write_bytes(b"nor this")
    with pytest.raises(ValueError, match="not one of 4 images can be read"):
        evaluate([str(tmp_path / "model")], str(image_folder), config)


def test_requests_that_cannot_be_met(tiny_model, image_folder, tmp_path, monkeypatch):
    tiny_model.save_pretrained(tmp_path / "model")
    tiny_model.config.encoder_only = True
    VQGANModel(tiny_model.config).save_pretrained(tmp_path / "encoder")

    def attempt(name: str = "model", **options):
        config = EvaluationConfig(**QUICK | {"output_dir": str(tmp_path / "out")} | options)
        return evaluate([str(tmp_path / name)], str(image_folder), config)

    with pytest.raises(ValueError, match="encoder: this checkpoint holds no decoder"):
        attempt("encoder")
    with pytest.raises(ValueError, match="resolution=33 is not a multiple of 2"):
        attempt(resolution=33)
    with pytest.raises(ValueError, match="no split 'dev'; it has train, validation"):
        attempt(split="dev")
    with pytest.raises(FileNotFoundError, match="no file at 'absent.pth'"):
        attempt(inception=True, inception_weights_path="absent.pth")
    (tmp_path / "broken.pth").write_bytes(b"not weights")
    with pytest.raises(ValueError, match="broken.pth does not hold torch-fidelity's Inception weights"):
        attempt(inception=True, inception_weights_path=str(tmp_path / "broken.pth"))
    with pytest.raises(ValueError, match="max_samples=0"):
        attempt(max_samples=0)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_autoencoder(tmp_path / "absent")
    assert not (tmp_path / "out").exists()

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    found = attempt(inception=True, lpips=["alex"], resolution=16)
    assert found["models"][0]["rfid"] is None and found["models"][0]["lpips_alex"] is None
    assert "--inception_weights_path" in found["skipped"]["rfid, ris"]
    assert found["skipped"]["lpips_alex"] == "needs images of 31 pixels, not 16."


def test_inception_weights_that_want_code_run_are_refused(tmp_path):
    class Sly:
        def __reduce__(self):
            return print, ("ran",)

    torch.save({"weight": Sly()}, tmp_path / "sly.pth")
    with pytest.raises(ValueError, match="does not hold torch-fidelity's Inception weights"):
        InceptionFeatures(str(tmp_path / "sly.pth"))


def test_model_card_is_updated_in_place(tiny_model, image_folder, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    card = tmp_path / "model" / "README.md"
    card.write_text("---\nlicense: mit\n---\n\n# Mine\n\n## Evaluation\n\nold\n\n## Training\n\nLong.\n")
    for count in (2, 1, 1):
        config = EvaluationConfig(**QUICK, output_dir=str(tmp_path / "out"), max_samples=count, update_model_card=True)
        found = evaluate([str(tmp_path / "model")], str(image_folder), config)
    text = card.read_text()
    assert "old" not in text and "## Training\n\nLong." in text and text.count("## Evaluation") == 1
    assert f"| PSNR (dB) | {found['psnr']:.2f} |" in text and "1 images of" in text
    data = ModelCard.load(card).data
    results = [result for result in data.eval_results if result.metric_type == "psnr"]
    assert data.license == "mit" and [result.metric_args["num_images"] for result in results] == [2, 1]
    assert json.loads((tmp_path / "model" / "evaluation.json").read_text())["psnr"] == found["psnr"]


def test_peak_memory_counts_what_is_alive_at_once():
    x = torch.zeros(2**18)
    with peak_memory(x.device) as peak:
        y = x + 1
        z = y * 2
        del y
        z.add_(1)
        z.view(2, -1)
        (x - 3).sum()
    assert x.nbytes * 2 <= peak[0] <= x.nbytes * 2 + 64
