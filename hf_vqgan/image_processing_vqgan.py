"""Images in and out: PIL <-> `pixel_values` in [-1, 1]."""

from typing import overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as tvF
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import PILImageResampling
from transformers.processing_utils import ImagesKwargs


def to_rgb(image: Image.Image) -> Image.Image:
    """
    Any PIL image as 8-bit RGB, as a viewer would show it on white paper.

    Beyond `Image.convert("RGB")`: 16-bit and float images are scaled to 8 bits (PIL would clip them to white), and
    transparent pixels, in a palette too, become white (PIL would show the colour hidden under them).
    """
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        # Mode "I" holds what PIL reads from 16-bit files; a float image may be in [0, 1] or in [0, 255].
        full_scale = 65535 if image.mode.startswith("I") else (1 if values.max(initial=0) <= 1 else 255)
        image = Image.fromarray((values / full_scale * 255).clip(0, 255).round().astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


class VQGANImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]  # a TypedDict
    """
    size_divisor (`int`, *optional*, defaults to 1):
        After resizing and cropping, the image's centre is cut to sides that are multiples of this: the model's
        `config.downsample_factor` lets images of any shape through whole, but for a few border pixels.
    """

    size_divisor: int


class VQGANImageProcessor(TorchvisionBackend):
    """
    PIL images, arrays or tensors to `pixel_values` `(B, 3, H, W)` in [-1, 1] (`processor(images)`), and back
    (`postprocess`).

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

    def process_image(self, image, do_convert_rgb: bool | None = None, **kwargs) -> Tensor:
        if do_convert_rgb and isinstance(image, Image.Image):
            image = to_rgb(image)
        return super().process_image(image, do_convert_rgb=do_convert_rgb, **kwargs)

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
