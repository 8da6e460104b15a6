import colorsys

import numpy as np
import pytest
import torch
from conftest import photo
from PIL import Image
from transformers import AutoImageProcessor

from hf_vqgan import VQGANImageProcessor
from hf_vqgan.image_processing_vqgan import MAX_ASPECT_RATIO, crop_to_multiple, to_eight_bits, to_rgb

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


# ---------------------------------------------------------------------------------------------------------------------
# Every mode of PIL against the definition of its colours

BYTES = np.random.default_rng(0).integers(0, 256, (6, 5, 4))  # rows of one to four channels


def on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return colours * alpha / 255 + 255 - alpha


def lab_to_srgb(lightness: float, a: float, b: float) -> np.ndarray:
    """CIELAB under D50, the white of PIL's colour management: to XYZ, linear sRGB (Bradford), sRGB in [0, 255]."""
    y = (lightness + 16) / 116
    xyz = np.array([y + a / 500, y, y - b / 200])
    xyz = np.where(xyz > 6 / 29, xyz**3, (xyz - 4 / 29) * 108 / 841) * [0.96422, 1.0, 0.82521]
    matrix = [[3.13386, -1.61687, -0.49061], [-0.97877, 1.91614, 0.03345], [0.07195, -0.22899, 1.40524]]
    linear = (np.array(matrix) @ xyz).clip(0, 1)
    return 255 * np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)


def from_bands(mode: str, *bands: np.ndarray) -> Image.Image:
    """An image from the bytes of its pixels, whatever they mean."""
    return Image.frombytes(mode, (5, 6), np.stack(bands, axis=-1).astype(np.uint8).tobytes())


def grey_example(mode: str) -> tuple[Image.Image, np.ndarray]:
    grey, alpha = BYTES[..., 0].astype(float), BYTES[..., 3].astype(float)
    match mode:
        case "1":
            return Image.fromarray(grey > 127), np.where(grey > 127, 255, 0)
        case "L":
            return from_bands("L", grey), grey
        case "LA":
            return from_bands("LA", grey, alpha), on_white(grey, alpha)
        case "La":
            image = Image.new("LA", (5, 6)).convert("La")
            image.frombytes(np.stack([grey * alpha // 255, alpha], axis=-1).astype(np.uint8).tobytes())
            return image, on_white(grey, alpha)
        case "I":
            return Image.fromarray((grey * 257).astype(np.int32)), grey
        case "I of 8 bits":
            return from_bands("L", grey).convert("I"), grey
        case "F in [0, 1]":
            return Image.fromarray((grey / 255).astype(np.float32)), grey
        case "F in [0, 255]":
            return Image.fromarray(grey.astype(np.float32)), grey
        case "I;16 with a transparent value":
            image = Image.fromarray((grey * 257).astype(np.uint16))
            image.info["transparency"] = int(grey[2, 3] * 257)
            return image, np.where(grey == grey[2, 3], 255, grey)
    big = ">" if mode == "I;16B" else "<"
    return Image.frombytes(mode, (5, 6), (grey * 257).astype(f"{big}u2").tobytes()), grey


def colour_example(mode: str) -> tuple[Image.Image, np.ndarray]:
    colours, alpha = BYTES[..., :3].astype(float), BYTES[..., 3:].astype(float)
    bands = np.moveaxis(BYTES, -1, 0)
    palette = np.random.default_rng(1).integers(0, 256, (256, 3))
    index, last = bands[0], BYTES[..., 3]
    match mode:
        case "RGB" | "RGBX":
            return from_bands(mode, *bands[: len(mode)]), colours
        case "RGB with a transparent colour":
            image = from_bands("RGB", *bands[:3])
            image.info["transparency"] = tuple(int(value) for value in BYTES[2, 3, :3])
            return image, np.where((BYTES[..., :3] == BYTES[2, 3, :3]).all(axis=-1, keepdims=True), 255, colours)
        case "RGBA":
            return from_bands(mode, *bands), on_white(colours, alpha)
        case "RGBa":
            return from_bands(mode, *(bands[:3] * last // 255), last), on_white(colours, alpha)
        case "CMYK":
            return from_bands(mode, *bands), (255 - colours) * (255 - alpha) / 255
        case "YCbCr":
            y, cb, cr = bands[:3] - np.array([0, 128, 128])[:, None, None]
            rgb = [y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb]
            return from_bands(mode, *bands[:3]), np.stack(rgb, axis=-1).clip(0, 255)
        case "HSV":
            rgb = [[colorsys.hsv_to_rgb(*pixel) for pixel in row] for row in colours / 255]
            return from_bands(mode, *bands[:3]), np.array(rgb) * 255
        case "LAB":
            values = [100 + bands[0] // 4, 118 + bands[1] // 13, 118 + bands[2] // 13]  # colours that sRGB has
            lab = np.stack([values[0] / 2.55, values[1] - 128.0, values[2] - 128.0], axis=-1)
            image = Image.merge("LAB", [from_bands("L", value) for value in values])
            return image, np.array([[lab_to_srgb(*pixel) for pixel in row] for row in lab])
        case "PA":
            image = Image.new("PA", (5, 6))
            image.putdata([(int(i), int(a)) for i, a in zip(index.flat, last.flat, strict=True)])
            image.putpalette(palette.astype(np.uint8).tobytes())
            return image, on_white(palette[index], alpha)
    image = from_bands("P", index)
    image.putpalette(palette.astype(np.uint8).tobytes())
    if mode == "P with a transparent index":
        image.info["transparency"] = int(index[2, 3])
        return image, np.where((index == index[2, 3])[..., None], 255, palette[index])
    if mode == "P with alpha in its palette":
        image.putpalette(np.concatenate([palette, np.arange(256)[:, None]], axis=1).astype(np.uint8).tobytes(), "RGBA")
        return image, on_white(palette[index], index[..., None].astype(float))
    if mode == "P with alpha":
        alphas = np.arange(256)[::-1]
        image.info["transparency"] = alphas.astype(np.uint8).tobytes()
        return image, on_white(palette[index], alphas[index][..., None])
    return image, palette[index]


GREY_MODES = ["1", "L", "LA", "La", "I", "I of 8 bits", "F in [0, 1]", "F in [0, 255]", "I;16", "I;16L", "I;16B",
              "I;16N", "I;16 with a transparent value"]  # fmt: skip
COLOUR_MODES = ["RGB", "RGBX", "RGB with a transparent colour", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "LAB", "P",
                "P with a transparent index", "P with alpha", "P with alpha in its palette", "PA"]  # fmt: skip


@pytest.mark.parametrize("mode", GREY_MODES + COLOUR_MODES)
def test_every_mode_against_the_definition_of_its_colours(mode):
    if mode in GREY_MODES:
        image, expected = grey_example(mode)
        expected = np.repeat(expected[..., None], 3, axis=2)
    else:
        image, expected = colour_example(mode)
    # Where colours were multiplied by a small alpha and rounded, a unit of theirs is many of what is seen, but on white
    # that part is multiplied by alpha again: one unit for each rounding.
    np.testing.assert_allclose(np.asarray(to_rgb(image)).astype(float), expected, atol=2.5)


def test_orientations():
    """All eight, as the Exif standard defines them: where the stored image's first row and column are shown."""
    stored = np.asarray(photo(3, (24, 16)))
    shown = {1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1], 5: stored.swapaxes(0, 1),
             6: np.rot90(stored, -1), 7: np.rot90(stored, 2).swapaxes(0, 1), 8: np.rot90(stored)}  # fmt: skip
    for orientation, expected in shown.items():
        image = photo(3, (24, 16))
        image.getexif()[274] = orientation
        assert np.array_equal(np.asarray(to_rgb(image)), expected)
        assert np.array_equal(np.asarray(to_rgb(to_rgb(image))), expected)  # not turned twice


def test_processor_turns_photographs_and_reads_files(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    photo(0, (40, 20)).save(tmp_path / "portrait.jpg", exif=exif)
    transparent = Image.new("RGBA", (20, 40), (255, 0, 0, 0))
    transparent.save(tmp_path / "transparent.png")
    for whole in ({}, {"do_convert_rgb": False}):
        processor = VQGANImageProcessor(do_resize=False, do_center_crop=False, **whole)
        with Image.open(tmp_path / "portrait.jpg") as image:
            assert processor(image, return_tensors="pt")["pixel_values"].shape == (1, 3, 40, 20)
    files = [str(tmp_path / name) for name in ("portrait.jpg", "transparent.png")]
    upright, white = processor(files, return_tensors="pt", do_convert_rgb=True)["pixel_values"]
    assert upright.shape == (3, 40, 20) and (white == 1).all()


# ---------------------------------------------------------------------------------------------------------------------
# Which value is white


@pytest.mark.parametrize("make", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])
@pytest.mark.parametrize(
    "values",
    [
        np.linspace(0, 1, 64, dtype=np.float32),
        np.linspace(0, 1, 64, dtype=np.float64),
        np.linspace(0, 1, 64, dtype=np.float16),
        np.linspace(0, 255, 64, dtype=np.float32),
        GREY_RAMP.ravel(),
        GREY_RAMP.ravel().astype(np.int64),
        GREY_RAMP.ravel().astype(np.uint16) * 257,
        GREY_RAMP.ravel().astype(np.int32) * 257,
    ],
    ids=["unit", "double", "half", "float255", "uint8", "int64", "uint16", "int32"],
)
def test_arrays_of_every_type_show_the_same_ramp(values, make):
    image = np.repeat(values.reshape(8, 8, 1), 3, axis=2)
    processor = VQGANImageProcessor(do_resize=False, do_center_crop=False)
    pixels = processor(make(image.copy()), return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    expected = torch.linspace(-1, 1, 64).view(8, 8).expand(3, 8, 8)
    torch.testing.assert_close(pixels[0], expected, atol=2 / 255, rtol=0)


@pytest.mark.parametrize("overshoot", [-0.1, 1.01, 1.25])
def test_overshoot_is_cut_off(overshoot):
    values = np.full((8, 8), 0.5, dtype=np.float32)
    values[0, 0] = overshoot
    grey = np.asarray(to_rgb(Image.fromarray(values)))
    assert grey[0, 0, 0] == (255 if overshoot > 1 else 0) and (grey[1:] == 128).all()
    grey = np.asarray(to_rgb(Image.fromarray(values * 255)))
    assert grey[0, 0, 0] == (255 if overshoot > 1 else 0) and (grey[1:] == 128).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 1.5, 1000.0])
def test_values_that_no_pixel_can_have(value):
    values = np.full((8, 8, 3), 0.5, dtype=np.float32)
    values[3, 4] = value
    with pytest.raises(ValueError, match=f"the value {value:g} is neither in"):
        VQGANImageProcessor()(values)
    with pytest.raises(ValueError, match=f"the value {value:g} is neither in"):
        to_rgb(Image.fromarray(values[..., 0]))


@pytest.mark.parametrize("value", [-1, 70_000])
def test_integers_that_no_pixel_can_have(value):
    with pytest.raises(ValueError, match=f"the value {value} is neither in"):
        to_eight_bits(torch.tensor([0, value]))


def test_arrays_that_are_not_to_be_scaled_are_left_alone():
    normalised = torch.rand(3, 8, 8) * 4 - 2
    processor = VQGANImageProcessor(do_resize=False, do_center_crop=False, do_rescale=False, do_normalize=False)
    assert torch.equal(processor(normalised, return_tensors="pt")["pixel_values"][0], normalised)


def test_transparent_arrays():
    rgba = np.zeros((4, 4, 4), dtype=np.float32)
    rgba[..., 3] = [0, 0.25, 0.5, 1]
    processor = VQGANImageProcessor(do_resize=False, do_center_crop=False)
    for image in (rgba, (rgba * 255).round().astype(np.uint8)):
        pixels = processor(image, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        torch.testing.assert_close(pixels[0, 0, 0], torch.tensor([1.0, 0.5, 0, -1]), atol=3 / 255, rtol=0)


def test_lines_are_not_enlarged_to_gigabytes():
    line = Image.new("RGB", (60_000, 1))
    for image in (line, np.asarray(line).copy()):
        with pytest.raises(ValueError, match="60000x1 pixels: one side is more than 100 times the other"):
            VQGANImageProcessor()(image, input_data_format="channels_last")
    longest = VQGANImageProcessor()(Image.new("RGB", (MAX_ASPECT_RATIO, 1)), return_tensors="pt")["pixel_values"]
    assert longest.shape == (1, 3, 256, 256)


def test_image_without_pixels():
    with pytest.raises(ValueError, match="0x5 pixels has none to show"):
        to_rgb(Image.new("RGB", (0, 5)))
