"""Pictures of generated images: grids of samples side by side, and figures over the guidance scale."""

import io
import math
from collections.abc import Mapping, Sequence

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from .pictures import draw_comparison

GAP = 2  # pixels between samples


def draw_grids(sets: Mapping[str, Tensor]) -> Image.Image:
    """
    A square grid of each set under its title. Samples of one number are in one place: where sets have noise and classes
    in common, they can be compared one by one.

    Args:
        sets (`Mapping[str, Tensor]`): Title to uint8 `(N, 3, S, S)`.
    """
    columns = math.ceil(max(len(images) for images in sets.values()) ** 0.5)
    grids = {}
    for title, images in sets.items():
        rows = math.ceil(max(len(each) for each in sets.values()) / columns)
        white = torch.full((rows * columns - len(images), *images.shape[1:]), 255, dtype=torch.uint8)
        grids[title] = make_grid(torch.cat([images, white]), nrow=columns, padding=GAP, pad_value=255)[None]
    return draw_comparison(grids, gap=8)


def draw_side_by_side(pictures: Sequence[Image.Image], gap: int = 24) -> Image.Image:
    """Pictures from left to right on white."""
    sheet = Image.new(
        "RGB",
        (sum(picture.width + gap for picture in pictures) - gap, max(picture.height for picture in pictures)),
        "white",
    )
    left = 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width + gap
    return sheet


def draw_sweep(
    curves: Mapping[str, Mapping[str, list[tuple[float, float]]]], level: Mapping[str, float]
) -> Image.Image:
    """
    A panel per figure: its value over the guidance scale, a line per pipeline.

    Args:
        curves (`Mapping`): Title of a figure to pipeline to (scale, value).
        level (`Mapping`): Title of a figure to a value that is drawn as a grey line: that of real images.
    """
    columns = min(3, len(curves))
    rows = math.ceil(len(curves) / columns)
    figure = Figure(figsize=(4.2 * columns, 3 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (title, lines) in zip(panels, curves.items(), strict=False):
        for name, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), "o-", markersize=4, linewidth=1, label=name)
        if title in level:
            axes.axhline(level[title], color="grey", linewidth=0.7, linestyle="--", label="held-out images")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("guidance scale", fontsize=9)
        axes.tick_params(labelsize=8)
    for axes in figure.axes[len(curves) :]:
        axes.set_axis_off()
    figure.axes[0].legend(fontsize=8)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return Image.open(buffer)
