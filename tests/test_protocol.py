import json

from hf_vqgan.hub.model_card import measured_on
from hf_vqgan.measurement.protocol import Protocol

PROTOCOL = Protocol("photos", "test", 24, resolution=64, resize=80, lpips_net="vgg", codebook_steps=100,
                    codebook_positions=25600)  # fmt: skip


def test_a_protocol_comes_back_from_its_file_and_says_what_was_measured():
    """Sentences are made of the fields alone: a file is never compared or read by its prose."""
    content = json.loads(json.dumps(PROTOCOL.as_dict() | {"of a later version": 1}))
    assert Protocol.from_dict(content).as_dict() == PROTOCOL.as_dict()
    assert measured_on({"protocol": content}, "psnr") == (
        "24 image(s) of photos, split test (shorter side to 80 pixels, the central 64x64), pixels clamped and mapped "
        "to [0, 1], mean over images; LPIPS v0.1 vgg"
    )
    assert measured_on({"protocol": content}, "usage") == (
        "codes of the training crops of the last 100 steps (25,600 positions); usage is the share of codes hit at "
        "least once"
    )
    whole = Protocol("photos", None, 3, resolution=64, resize=0, crop="none")
    assert whole.describe_images() == "3 image(s) of photos (at their own size, whole)"


def test_cards_of_models_that_were_pushed_with_sentences_can_be_made_again():
    metrics = {"measured_on": {"psnr, ssim, lpips, l1, validation_*": "2 images", "perplexity, usage": "9 steps"}}
    assert [measured_on(metrics, name) for name in ("lpips", "perplexity")] == ["2 images", "9 steps"]
