"""Images in and out: PIL <-> `pixel_values` in [-1, 1]."""

from pathlib import Path
from typing import overload

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor
from torchvision.transforms.v2 import functional as tvF
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import PILImageResampling
from transformers.processing_utils import ImagesKwargs

# Resizing scales the shorter side to the requested size: an image one pixel wide would become gigabytes.
MAX_ASPECT_RATIO = 100

# How to undo each EXIF orientation except the first, which is upright
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_rgb(image: Image.Image) -> Image.Image:
    """
    Any PIL image as upright 8-bit RGB on white: how all images enter this package.

    - Turned as its EXIF orientation says. Of an animation, the current frame, which is the first after opening.
    - Transparency, of a channel, a palette or one colour, is composited on white: alpha * colour + (1 - alpha) * 255.
    - 16-bit and float images are scaled to 8 bits by `to_eight_bits`, where PIL would clip them.
    - CMYK, YCbCr, LAB and HSV as PIL converts them. Colour profiles are not applied.

    Returns:
        A new image without metadata: passing it in again changes nothing.

    Raises:
        ValueError: for an image without pixels, and for values out of range.
        OSError: if the image's file is damaged.
    """
    if 0 in image.size:
        raise ValueError(f"an image of {image.width}x{image.height} pixels has none to show.")
    image = upright(image)
    if image.mode.startswith(("I", "F")):
        image = _integer_or_float_to_grey(image)
    elif image.mode in ("La", "RGBa"):  # colours multiplied by alpha
        image = image.convert(image.mode.upper())
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    image.info = {}
    return image


def upright(image: Image.Image) -> Image.Image:
    """The image rotated by its EXIF orientation; the image itself if it is upright."""
    image.load()
    turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    return image if turn is None else image.transpose(turn)


def _integer_or_float_to_grey(image: Image.Image) -> Image.Image:
    """Modes I, I;16 and F as L, or as LA if one value stands for transparent."""
    values = np.asarray(image)
    grey = Image.fromarray(to_eight_bits(torch.from_numpy(values.astype(values.dtype.newbyteorder("=")))).numpy())
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return grey


def to_eight_bits(values: Tensor) -> Tensor:
    """
    Pixels of any type to uint8. The dtype decides which value is white or, where it cannot, the image's values do:

    - uint8: 255; uint16: 65535; bool: True.
    - other integers: 255 if none is higher, else 65535.
    - floats: 1 if none is above 2, else 255. Overshoots of resampling, up to a quarter of the range, are clipped.

    Raises:
        ValueError: for NaN, infinity, and values further out of range; it names the value.
    """
    if values.dtype == torch.uint8:
        return values
    if values.dtype == torch.bool:
        return values.to(torch.uint8) * 255
    real = values.is_floating_point()
    exact = values.float() if real else values.to(torch.int64)
    lowest, highest = exact.min().item(), exact.max().item()
    if real:
        white, beyond = (1 if highest <= 2 else 255), 0.25
    else:
        white, beyond = (65535 if values.dtype == torch.uint16 or highest > 255 else 255), 0.0
    for value in (lowest, highest):
        if not -beyond * white <= value <= (1 + beyond) * white:  # nor is NaN
            raise ValueError(
                f"an image with the value {value:g} is neither in [0, {'1' if real else '255'}] nor in "
                f"[0, {'255' if real else '65535'}]. Bring its values into one of these ranges."
            )
    return (exact.float() * (255 / white)).clamp(0, 255).round().to(torch.uint8)


def check_aspect_ratio(width: int, height: int) -> None:
    """Raises ValueError for an image so narrow that enlarging its shorter side would make it gigantic."""
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(
            f"an image of {width}x{height} pixels: one side is more than {MAX_ASPECT_RATIO} times the other. Crop it."
        )


class VQGANImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]  # a TypedDict
    """
    size_divisor (`int`, *optional*, defaults to 1):
        After resizing and cropping, the image is center-cropped to multiples of this. With the model's
        `config.downsample_factor`, images of any shape pass whole except for a few border pixels.
    """

    size_divisor: int


class VQGANImageProcessor(TorchvisionBackend):
    """
    PIL images, files, arrays or tensors to `pixel_values` `(B, 3, H, W)` in [-1, 1] (`processor(images)`), and back
    (`postprocess`).

    Images and files go through [`~image_processing_vqgan.to_rgb`]: upright, on white. Arrays and tensors may hold
    integers or floats ([`~image_processing_vqgan.to_eight_bits`]), alpha as a fourth channel; with `do_rescale=False`
    they are used unchanged.

    By default the shorter side becomes 256 pixels (bicubic, antialiased) and the central 256 x 256 are kept. For whole
    images: `VQGANImageProcessor(do_resize=False, do_center_crop=False, size_divisor=model.config.downsample_factor)`.
    """

    valid_kwargs = VQGANImageProcessorKwargs
    model_input_names = ["pixel_values"]

    do_convert_rgb = True
    do_resize = True
    size = {"shortest_edge": 256}
    default_to_square = False
    resample = PILImageResampling.BICUBIC
    do_center_crop = True
    crop_size = {"height": 256, "width": 256}
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    size_divisor = 1

    def fetch_images(self, image_url_or_urls):
        if isinstance(image_url_or_urls, str) and Path(image_url_or_urls).is_file():
            with Image.open(image_url_or_urls) as image:
                return to_rgb(image)  # transformers would reveal colours hidden by transparency
        return super().fetch_images(image_url_or_urls)

    def process_image(self, image, do_convert_rgb: bool | None = None, **kwargs) -> Tensor:
        if isinstance(image, Image.Image):
            image = to_rgb(image) if do_convert_rgb else upright(image)
        elif kwargs.get("do_rescale") and kwargs.get("rescale_factor") == 1 / 255:
            image = to_eight_bits(torch.as_tensor(image))
        return super().process_image(image, do_convert_rgb=do_convert_rgb, **kwargs)

    def resize(self, image: Tensor, *args, **kwargs) -> Tensor:
        check_aspect_ratio(image.shape[-1], image.shape[-2])
        return super().resize(image, *args, **kwargs)

    def _preprocess(self, images: list[Tensor], *args, size_divisor: int = 1, return_tensors=None, **kwargs):
        pixel_values = super()._preprocess(images, *args, return_tensors=None, **kwargs)["pixel_values"]
        pixel_values = [crop_to_multiple(pixels, size_divisor) for pixels in pixel_values]
        return BatchFeature(data={"pixel_values": pixel_values}, tensor_type=return_tensors)

    @overload
    def postprocess(self, sample: Tensor) -> list[Image.Image]: ...

    @overload
    def postprocess(self, sample: Tensor, output_type: str) -> list[Image.Image] | np.ndarray | Tensor: ...

    def postprocess(self, sample: Tensor, output_type: str = "pil") -> list[Image.Image] | np.ndarray | Tensor:
        """
        Args:
            sample (`Tensor` of shape `(B, 3, H, W)`): Pixels in about [-1, 1]; clamped.
            output_type (`str`):
                `"pil"`: list of images; `"np"`: `(B, H, W, 3)` in [0, 1]; `"pt"`: `(B, 3, H, W)` in [0, 1].
        """
        pixels = (sample.detach().float() * 0.5 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return pixels
        if output_type == "np":
            return pixels.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "pil":
            return [tvF.to_pil_image((image * 255).round().to(torch.uint8)) for image in pixels.cpu()]
        raise ValueError(f"output_type={output_type!r} must be 'pil', 'np' or 'pt'.")


def crop_to_multiple(pixels: Tensor, divisor: int) -> Tensor:
    """The centre of `(..., H, W)` whose sides are the largest multiples of `divisor`.

    Raises:
        ValueError: if a side is shorter than `divisor`.
    """
    height, width = (side // divisor * divisor for side in pixels.shape[-2:])
    if not (height and width):
        raise ValueError(
            f"image of {pixels.shape[-2]}x{pixels.shape[-1]} pixels is smaller than size_divisor={divisor}."
        )
    return tvF.center_crop(pixels, [height, width])
