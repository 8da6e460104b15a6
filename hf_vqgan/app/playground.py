"""What a person does with a trained model by hand: look at an image's codes, exchange some, walk between two images,
sample. Functions of a model and tensors; the page that shows them is `playground_page.py`.

Shapes: C channels, H x W pixels, h x w positions of codes, f = H/h, K codes, D numbers per code, n codebooks.
"""

import math
import threading
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio
from torchvision.utils import make_grid

from ..files.sources import check_source
from ..image_processing_vqgan import VQGANImageProcessor, to_rgb
from ..measurement.pictures import code_colours
from ..modeling_vqgan import VQGANModel
from ..pipelines import VQGANLatentDiffusionPipeline

PALETTE_COLUMNS, PALETTE_CELL = 32, 30
# transformers and diffusers swap out global functions while they load, so that one load spoils another beside it.
_LOADING = threading.Lock()


@dataclass(frozen=True, eq=False)
class Canvas:
    """
    An image whose codes are being edited. Every edit makes a new one.

    Args:
        model ([`VQGANModel`]): Whose codes they are.
        pixels (`Tensor` of shape `(1, C, H, W)`): The image, in [-1, 1].
        unedited (`Tensor` of shape `(1, C, H, W)`): Its reconstruction, in [-1, 1].
        sample (`Tensor` of shape `(1, C, H, W)`): What the codes decode to now, in [-1, 1].
        history (`tuple[Tensor]`): Codes `(1, h, w)` or `(1, h, w, n)`: the encoder's, and those after each edit.
    """

    model: VQGANModel
    pixels: Tensor
    unedited: Tensor
    sample: Tensor
    history: tuple[Tensor, ...]

    @property
    def indices(self) -> Tensor:
        """The codes as they are now."""
        return self.history[-1]


@dataclass(frozen=True)
class CanvasFigures:
    """
    Args:
        distinct (`int`): How many different codes the image uses (combinations of codes, with several codebooks).
        bytes (`float`): What the codes take up at log2 K bits each.
        psnr (`float`): dB of `sample` against `pixels`, in [0, 1].
        edited (`int`): Positions whose code is not the encoder's.
        changed_pixels (`int`): Pixels that differ, as 8-bit colours, from the reconstruction before any edit.
    """

    distinct: int
    bytes: float
    psnr: float
    edited: int
    changed_pixels: int


@dataclass(frozen=True, eq=False)
class Journey:
    """
    Two images to walk between.

    Args:
        model ([`VQGANModel`]): In whose space to walk.
        pixels (`Tensor` of shape `(2, C, H, W)`): The images, in [-1, 1].
        latents (`Tensor` of shape `(2, D, h, w)`): Their latents, before quantization.
    """

    model: VQGANModel
    pixels: Tensor
    latents: Tensor


def load_model(name: str) -> VQGANModel:
    """
    A model by Hub name or folder, ready to use. Only safetensors are read, and no code from the repository is run.

    Raises:
        OSError: if there is no such model.
        ValueError: if there is one, but of another kind.
    """
    check_source(name)
    with _LOADING:
        model = VQGANModel.from_pretrained(name, use_safetensors=True)
    return model.to(_device()).eval().requires_grad_(False)


def load_pipeline(name: str) -> VQGANLatentDiffusionPipeline:
    """
    A pipeline by Hub name or folder, under the same rules.

    Raises:
        OSError: if there is no such pipeline.
        ValueError: if it is not a [`VQGANLatentDiffusionPipeline`].
    """
    check_source(name)
    kind = VQGANLatentDiffusionPipeline.load_config(name).get("_class_name")
    if kind != VQGANLatentDiffusionPipeline.__name__:
        raise ValueError(f"{name} holds a {kind}; expected a {VQGANLatentDiffusionPipeline.__name__}.")
    with _LOADING:
        pipeline = VQGANLatentDiffusionPipeline.from_pretrained(name, use_safetensors=True)
    return pipeline.to(_device())


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def fit_image(model: VQGANModel, image: Image.Image, longest_side: int) -> Tensor:
    """
    `(1, 3, H, W)` in [-1, 1]: upright as its camera says, reduced to `longest_side` pixels if larger, its centre cut to
    sides that f divides.

    Raises:
        ValueError: if a side is then shorter than f.
    """
    image = to_rgb(image)
    image.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS)
    factor = model.config.downsample_factor
    processor = VQGANImageProcessor(do_resize=False, do_center_crop=False, size_divisor=factor)
    return processor(image, return_tensors="pt")["pixel_values"].to(model.device)


def fit_pair(model: VQGANModel, start: Image.Image, end: Image.Image, longest_side: int) -> Tensor:
    """`(2, 3, H, W)` in [-1, 1]: both images, the second scaled and cut to the shape of the first."""
    first = fit_image(model, start, longest_side)
    second = ImageOps.fit(to_rgb(end), (first.shape[3], first.shape[2]), Image.Resampling.LANCZOS)
    return torch.cat([first, fit_image(model, second, longest_side)])


def magnification(pixels: Tensor, longest_side: int) -> int:
    """How many whole times an image `(..., H, W)` can be enlarged to at most `longest_side`; at least 1."""
    return max(1, longest_side // max(pixels.shape[-2:]))


def to_image(pixels: Tensor, times: int = 1) -> Image.Image:
    """`(1, C, H, W)` in about [-1, 1] as a picture, so many times enlarged, its pixels as squares."""
    image = VQGANImageProcessor().postprocess(pixels)[0]
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


@torch.no_grad()
def open_canvas(model: VQGANModel, pixels: Tensor) -> Canvas:
    """The codes of `pixels` `(1, C, H, W)` in [-1, 1], and what they decode to."""
    output = model(pixels)
    sample = output.sample.float().clamp(-1, 1)
    return Canvas(model, pixels, sample, sample, (output.indices,))


def paint(canvas: Canvas, row: int, column: int, code: int, brush: int = 1, codebook: int = 0) -> Canvas:
    """
    Put one code at `brush` x `brush` positions around one, as far as there are any, and decode again.

    Raises:
        ValueError: for a position outside the image, and a code or codebook that the model does not have.
    """
    height, width = canvas.indices.shape[1:3]
    quantizer = canvas.model.quantize
    limits = {"row": (row, height), "column": (column, width), "code": (code, quantizer.num_codes)}
    for name, (value, limit) in (limits | {"codebook": (codebook, quantizer.num_codebooks)}).items():
        if not 0 <= value < limit:
            raise ValueError(f"{name}={value}: expected a number from 0 to {limit - 1}.")
    indices = canvas.indices.clone()
    top, left = (max(0, position - (brush - 1) // 2) for position in (row, column))
    one_codebook = indices if quantizer.num_codebooks == 1 else indices[..., codebook]
    one_codebook[:, top : row + brush // 2 + 1, left : column + brush // 2 + 1] = code
    return _decode(canvas, (*canvas.history, indices))


def undo(canvas: Canvas) -> Canvas:
    """Without the last edit, if there is one."""
    return _decode(canvas, canvas.history[:-1] or canvas.history)


def reset(canvas: Canvas) -> Canvas:
    """Without all edits."""
    return _decode(canvas, canvas.history[:1])


@torch.no_grad()
def _decode(canvas: Canvas, history: tuple[Tensor, ...]) -> Canvas:
    sample = canvas.model.decode_indices(history[-1], return_dict=False)[0].float().clamp(-1, 1)
    return replace(canvas, sample=sample, history=history)


def measure(canvas: Canvas) -> CanvasFigures:
    """What can be said of a canvas in numbers."""
    quantizer = canvas.model.quantize
    codes, chosen = (indices.view(-1, quantizer.num_codebooks) for indices in (canvas.indices, canvas.history[0]))
    shown, before, real = (pixels * 0.5 + 0.5 for pixels in (canvas.sample, canvas.unedited, canvas.pixels))
    return CanvasFigures(
        distinct=len(codes.unique(dim=0)),
        bytes=codes.numel() * math.log2(quantizer.num_codes) / 8,
        psnr=float(peak_signal_noise_ratio(shown, real, data_range=1.0)),
        edited=int((codes != chosen).any(dim=1).sum()),
        changed_pixels=int(((shown * 255).round() != (before * 255).round()).any(dim=1).sum()),
    )


def code_map(canvas: Canvas, codebook: int = 0) -> Tensor:
    """The codes as an image `(1, 3, H, W)` in [-1, 1], f x f pixels each: similar codes have similar colours."""
    colours = code_colours(canvas.model, codebook)[codebook_indices(canvas, codebook)].permute(0, 3, 1, 2)
    return F.interpolate(colours, size=canvas.sample.shape[2:], mode="nearest")


def codebook_indices(canvas: Canvas, codebook: int = 0) -> Tensor:
    """The codes `(1, h, w)` out of one codebook."""
    return canvas.indices if canvas.indices.ndim == 3 else canvas.indices[..., codebook]


def code_patches(canvas: Canvas, most: int, codebook: int = 0) -> tuple[Tensor, Tensor]:
    """
    What the codes of this image look like in it: for each code, the mean of what is decoded where it stands. Codes act
    on their neighbours too, so this is a likeness, no more.

    Args:
        most (`int`): How many codes at most, the most frequent first.

    Returns:
        codes `(m,)` and patches `(m, C, f, f)` in [-1, 1].
    """
    codes, which, counts = codebook_indices(canvas, codebook).unique(return_inverse=True, return_counts=True)
    height, width = which.shape[1:]
    factor = canvas.sample.shape[2] // height
    patches = canvas.sample[0].unflatten(2, (width, factor)).unflatten(1, (height, factor))  # (C, h, f, w, f)
    patches = patches.permute(1, 3, 0, 2, 4).flatten(0, 1)  # (h*w, C, f, f)
    sums = patches.new_zeros(len(codes), *patches.shape[1:]).index_add_(0, which.flatten(), patches)
    order = counts.argsort(descending=True, stable=True)[:most]
    return codes[order], (sums / counts[:, None, None, None])[order]


def draw_palette(patches: Tensor) -> Image.Image:
    """Patches `(m, C, f, f)` side by side, `PALETTE_COLUMNS` in a row, in cells of `PALETTE_CELL` pixels."""
    inside = PALETTE_CELL - 2
    enlarged = F.interpolate(patches, size=(inside, inside), mode="nearest")
    grid = make_grid(enlarged, nrow=PALETTE_COLUMNS, padding=2, pad_value=0.6)[:, 1:-1, 1:-1]
    blank = PALETTE_COLUMNS * PALETTE_CELL - grid.shape[2]  # to the right of a first row that is not full
    return to_image(F.pad(grid, (0, blank), value=0.6)[None])


def patch_at(x: float, y: float, count: int) -> int:
    """Which of `count` patches the point (x, y) of their palette shows; the last one where there is none."""
    row, column = cell_at(x, y, PALETTE_CELL, -(-count // PALETTE_COLUMNS), PALETTE_COLUMNS)
    return min(row * PALETTE_COLUMNS + column, count - 1)


def cell_at(x: float, y: float, cell: int, rows: int, columns: int) -> tuple[int, int]:
    """Row and column, of so many, of the square of `cell` pixels with the point (x, y); of the nearest, outside."""
    row, column = int(y // cell), int(x // cell)
    return min(max(row, 0), rows - 1), min(max(column, 0), columns - 1)


@torch.no_grad()
def open_journey(model: VQGANModel, pixels: Tensor) -> Journey:
    """From the first of two images `(2, C, H, W)` in [-1, 1] to the second."""
    return Journey(model, pixels, model.encode(pixels).latents)


@torch.no_grad()
def walk(journey: Journey, position: float) -> tuple[Tensor, Tensor, Tensor]:
    """
    Three ways from one image, at `position` 0, to the other, at 1. The last two run from reconstruction to
    reconstruction.

    Returns:
        Images `(1, C, H, W)`: the pixels' mean; decoded from the mean of the images' codes, which is no code itself;
        decoded from the codes that are nearest to the mean of the images' latents.
    """

    def between(ends: Tensor) -> Tensor:
        return torch.lerp(ends[:1], ends[1:], position)

    model = journey.model
    codes = between(model.quantize(journey.latents).quantized)
    nearest = model.quantize(between(journey.latents)).quantized
    sample = model.decode(torch.cat([codes, nearest]), force_not_quantize=True).sample
    return between(journey.pixels), sample[:1], sample[1:]


def sample_images(
    pipeline: VQGANLatentDiffusionPipeline,
    count: int,
    class_label: int | None = None,
    seed: int = 0,
    num_inference_steps: int = 30,
    guidance_scale: float = 1.0,
) -> list[Image.Image]:
    """
    Images that the pipeline draws. Number i depends on `seed + i` alone, however many there are.

    Args:
        class_label (`int`, *optional*): `None`: no class, and so nothing to guide towards.
    """
    return pipeline(
        batch_size=count,
        class_labels=class_label,
        guidance_scale=1.0 if class_label is None else guidance_scale,
        num_inference_steps=num_inference_steps,
        generator=[torch.Generator().manual_seed(seed + number) for number in range(count)],
    ).images
