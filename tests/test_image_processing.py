import numpy as np
import pytest
import torch
from conftest import photo
from PIL import Image
from transformers import AutoImageProcessor

from hf_vqgan import VQGANImageProcessor
from hf_vqgan.image_processing_vqgan import crop_to_multiple, to_rgb

GREY_RAMP = np.linspace(0, 255, 64, dtype=np.uint8).reshape(8, 8)


def test_default_range_and_shape():
    pixel_values = VQGANImageProcessor()([photo(0), photo(1, (50, 90))], return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (2, 3, 256, 256) and pixel_values.dtype == torch.float32
    assert -1 <= pixel_values.min() < -0.5 and 0.5 < pixel_values.max() <= 1


def test_round_trip_is_exact():
    processor = VQGANImageProcessor(do_resize=False, do_center_crop=False)
    image = photo(0)
    (back,) = processor.postprocess(processor(image, return_tensors="pt")["pixel_values"])
    assert np.array_equal(np.asarray(back), np.asarray(image))


def test_whole_images_lose_only_their_border():
    processor = VQGANImageProcessor(do_resize=False, do_center_crop=False, size_divisor=16)
    image = photo(0, (70, 50))
    pixel_values = processor(image, return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (1, 3, 48, 64)
    assert np.array_equal(np.asarray(processor.postprocess(pixel_values)[0]), np.asarray(image)[1:49, 3:67])


def test_saved_and_found_by_auto_class(tmp_path):
    VQGANImageProcessor(size_divisor=8).save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, VQGANImageProcessor) and loaded.size_divisor == 8


def test_output_types():
    sample = torch.tensor([-2.0, 0.0, 2.0])[None, :, None, None]
    processor = VQGANImageProcessor()
    assert processor.postprocess(sample, "pt").flatten().tolist() == [0, 0.5, 1]
    assert processor.postprocess(sample, "np").shape == (1, 1, 1, 3)
    assert processor.postprocess(sample)[0].getpixel((0, 0)) == (0, 128, 255)
    with pytest.raises(ValueError, match="output_type='jpg'"):
        processor.postprocess(sample, "jpg")


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(GREY_RAMP),  # L
        Image.fromarray(GREY_RAMP.astype(np.uint16) * 257),  # I;16
        Image.fromarray(GREY_RAMP.astype(np.int32) * 257),  # I, as PIL reads some 16-bit PNGs
        Image.fromarray(GREY_RAMP.astype(np.float32) / 255),  # F in [0, 1]
        Image.fromarray(GREY_RAMP.astype(np.float32)),  # F in [0, 255]
        Image.fromarray(GREY_RAMP).convert("P"),
        Image.fromarray(GREY_RAMP).convert("RGBA"),
    ],
    ids=["L", "I;16", "I", "F1", "F255", "P", "RGBA"],
)
def test_every_mode_shows_the_same_grey_ramp(image):
    expected = np.repeat(GREY_RAMP[..., None], 3, axis=2)
    assert np.abs(np.asarray(to_rgb(image)).astype(int) - expected).max() <= 1


def test_cmyk_and_transparency():
    assert to_rgb(Image.new("CMYK", (2, 2), (0, 255, 255, 0))).getpixel((0, 0)) == (255, 0, 0)
    assert to_rgb(Image.new("RGBA", (2, 2), (255, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("LA", (2, 2), (0, 128))).getpixel((0, 0)) == (127, 127, 127)
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([255, 0, 0])
    palette.info["transparency"] = 0
    assert to_rgb(palette).getpixel((0, 0)) == (255, 255, 255)


def test_image_smaller_than_divisor():
    with pytest.raises(ValueError, match="5x40 pixels is smaller than size_divisor=8"):
        crop_to_multiple(torch.zeros(3, 5, 40), 8)
