"""Pictures of a latent space: ways between images, a walk, codes and their neighbours, latents as colours, bars."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.v2 import functional as tvF
from torchvision.utils import make_grid

from .latent_space import Measure, Network, exchange_code, lerp, nearest_codes, slerp
from .pictures import principal_coordinates

MIN_SIDE = 64  # smaller images are enlarged


def draw_strips(strips: list[tuple[str, Tensor]]) -> Image.Image:
    """One labelled row per strip of images `(T, 3, H, W)` in [-1, 1], all of one size."""
    rows = []
    for label, images in strips:
        row = tvF.to_pil_image(make_grid(_shown(images), nrow=len(images), pad_value=1.0))
        canvas = Image.new("RGB", (row.width, row.height + 14), "white")
        canvas.paste(row, (0, 14))
        ImageDraw.Draw(canvas).text((2, 2), label, fill="black")
        rows.append(canvas)
    picture = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        picture.paste(row, (0, top))
        top += row.height
    return picture


def draw_interpolations(
    decoders: Mapping[str, Network], latents: Tensor, pixels: Tensor, pairs: int = 4, frames: int = 9
) -> Image.Image:
    """
    From one image to the next, for the first `pairs` pairs: through the latents (slerp) with each of `decoders`, and as
    a cross-fade of the pixels. Where a row looks like the cross-fade, two ghosts at once, the latents know no way
    between.

    Args:
        decoders (`Mapping`): Label to a network from latents as in `latents` to pixels.
    """
    strips, t = [], torch.linspace(0, 1, frames, device=latents.device)
    for pair in range(min(pairs, len(latents) // 2)):
        start, end = (latents[number].expand(frames, *latents.shape[1:]) for number in (2 * pair, 2 * pair + 1))
        strips += [(label, decode(slerp(start, end, t))) for label, decode in decoders.items()]
        start, end = (pixels[number].expand(frames, *pixels.shape[1:]) for number in (2 * pair, 2 * pair + 1))
        strips.append(("cross-fade of the originals", lerp(start, end, t)))
    return draw_strips(strips)


def draw_walk(decoders: Mapping[str, Network], latents: Tensor, frames: int = 12) -> list[Image.Image]:
    """A round trip through all of `latents`, `frames` from each to the next; one column for each of `decoders`."""
    t = torch.arange(frames, device=latents.device) / frames
    ways = [
        slerp(start.expand(frames, *start.shape), end.expand(frames, *end.shape), t)
        for start, end in zip(latents, latents.roll(-1, dims=0), strict=True)
    ]
    columns = [torch.cat([decode(way) for way in ways]) for decode in decoders.values()]
    return [draw_strips([(" | ".join(decoders), torch.stack(images))]) for images in zip(*columns, strict=True)]


def draw_neighbourhoods(
    decode_indices: Network, codebook: Tensor, context: Tensor, rows: int = 6, neighbours: int = 8, window: int = 5
) -> Image.Image:
    """
    Codes of one image and their nearest codes, nearest first, the codes themselves on the left: each as an area filled
    with it, and each at one position of the image, of which the `window` x `window` positions around it are shown.

    Args:
        decode_indices (`Network`): Codes `(B, h, w, n)` to pixels.
        codebook (`Tensor` of shape `(K, D)`): Codes of the first codebook.
        context (`Tensor` of shape `(1, h, w, n)`): The image. Its most frequent codes are shown.
    """
    numbers, counts = context[..., 0].unique(return_counts=True)
    numbers = numbers[counts.argsort(descending=True)[:rows]]
    near = nearest_codes(codebook, numbers, min(neighbours, len(codebook) - 1))
    height, width = context.shape[1:3]
    strips = []
    for code, others in zip(numbers.tolist(), near, strict=True):
        family = torch.cat([others.new_tensor([code]), others])
        areas = context.repeat(len(family), 1, 1, 1)
        areas[..., 0] = family[:, None, None]
        filled = decode_indices(areas)
        # Of the positions that have the code, the one nearest the middle.
        places = (context[0, ..., 0] == code).nonzero()
        offsets = places - torch.tensor([height // 2, width // 2], device=places.device)
        row, column = places[offsets.square().sum(dim=1).argmin()].tolist()
        placed = decode_indices(exchange_code(context, row, column, family))
        factor = placed.shape[2] // height
        top, left = (
            min(max(at - window // 2, 0), max(side - window, 0)) * factor
            for at, side in ((row, height), (column, width))
        )
        size = placed.shape[2:]
        crops = [images[..., top : top + window * factor, left : left + window * factor] for images in (filled, placed)]
        as_area, in_place = (F.interpolate(crop, size=size, mode="nearest") for crop in crops)
        strips += [(f"code {code} and its nearest codes, as an area", as_area), ("... at one position", in_place)]
    return draw_strips(strips)


def draw_principal_colours(pixels: Tensor, latents: Tensor, count: int = 8) -> Image.Image:
    """
    Images above their latents, whose three principal coordinates over all of these images are red, green and blue.
    """
    pixels, latents = pixels[:count], latents[:count]
    vectors = latents.permute(0, 2, 3, 1).flatten(0, 2).float()
    colours = principal_coordinates(vectors, 3)
    low, high = (colours.quantile(q, dim=0) for q in (0.02, 0.98))
    colours = ((colours - low) / (high - low).clamp_min(1e-8)).clamp(0, 1) * 2 - 1
    maps = colours.view(len(latents), *latents.shape[2:], 3).permute(0, 3, 1, 2)
    maps = F.interpolate(maps, size=pixels.shape[2:], mode="nearest")
    return draw_strips([("images", pixels), ("three principal coordinates of the latents", maps)])


def draw_comparison(tables: Mapping[str, Mapping[str, Measure]]) -> Figure:
    """
    One panel per measure, one bar per model with its 95 % interval; the arrow says which way is better.

    Args:
        tables (`Mapping`): Model -> measure -> figure; the same measures for all models.
    """
    names = list(next(iter(tables.values())))
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(3.6 * columns, (1.1 + 0.32 * len(tables)) * lines), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for panel, name in zip(panels, names, strict=False):
        for row, (model, table) in enumerate(tables.items()):
            measure = table[name]
            errors = [[max(0.0, measure.value - measure.low)], [max(0.0, measure.high - measure.value)]]
            panel.barh(row, measure.value, xerr=errors, color=f"C{row % 10}", capsize=3, label=model)
        arrow = {"higher": "↑ ", "lower": "↓ ", None: ""}[measure.better]
        panel.set_title(arrow + name, fontsize=9)
        panel.set_xlabel(measure.unit, fontsize=8)
        panel.set_yticks(range(len(tables)), tables, fontsize=8)
        panel.tick_params(axis="x", labelsize=7)
        panel.axvline(0, color="black", linewidth=0.5)
        panel.invert_yaxis()
    for panel in panels[len(names) :]:
        panel.set_axis_off()
    figure.suptitle("arrow: which way is better; whisker: 95 % interval", fontsize=9)
    return figure


def _shown(images: Tensor) -> Tensor:
    """Pixels in [-1, 1] to [0, 1], small ones enlarged by a whole number."""
    factor = max(1, -(-MIN_SIDE // images.shape[2]))
    images = F.interpolate(images.float(), scale_factor=float(factor), mode="nearest") if factor > 1 else images.float()
    return (images.cpu() / 2 + 0.5).clamp(0, 1)
