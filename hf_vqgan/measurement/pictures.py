"""Pictures that a run is judged by: reconstructions beside originals and code maps, and curves of every figure."""

import io
import textwrap
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.v2 import functional as tvF
from torchvision.utils import make_grid

from ..modeling_vqgan import VQGANModel


def codebook_vectors(model: VQGANModel, codebook: int = 0) -> Tensor:
    """The codes `(K, D)` of one codebook, float32; if there are several, with code 0 of the others."""
    quantizer = model.quantize
    indices = torch.arange(quantizer.num_codes, device=model.device)
    if quantizer.num_codebooks > 1:
        indices = F.pad(indices[:, None], (codebook, quantizer.num_codebooks - 1 - codebook))
    return quantizer.code_vectors(indices).detach().float()


def code_colours(model: VQGANModel, codebook: int = 0) -> Tensor:
    """
    One RGB colour in [-1, 1] per code of a codebook, `(K, 3)`: its coordinates along the codebook's three principal
    axes, ranked, so that similar codes look alike and every shade is used.
    """
    codes = codebook_vectors(model, codebook)
    ranks = principal_coordinates(codes, 3).argsort(dim=0).argsort(dim=0)
    return ranks.float() / max(len(codes) - 1, 1) * 2 - 1


def principal_coordinates(codes: Tensor, dimensions: int) -> Tensor:
    """`(K, D)` to `(K, dimensions)`: coordinates along the principal axes, 0 where D has no more of them."""
    axes = torch.linalg.svd(codes - codes.mean(dim=0), full_matrices=False).Vh[:dimensions]
    return F.pad((codes - codes.mean(dim=0)) @ axes.T, (0, dimensions - len(axes)))


@torch.no_grad()
def draw_reconstructions(model: VQGANModel, images: list[Tensor]) -> Image.Image:
    """One row per image `(3, H, W)` in [-1, 1]: original | reconstruction | code map, one colour per code."""
    training = model.training
    model.eval()
    colours = code_colours(model)
    rows = []
    for pixels in images:
        output = model(pixels[None].to(model.device))
        codes = colours[output.indices if model.quantize.num_codebooks == 1 else output.indices[..., 0]].permute(
            0, 3, 1, 2
        )
        code_map = F.interpolate(codes, size=pixels.shape[1:], mode="nearest")
        rows.append(torch.cat([pixels[None], output.sample.float().cpu(), code_map.cpu()]).clamp(-1, 1) / 2 + 0.5)
    model.train(training)
    width = max(row.shape[-1] for row in rows)
    strips = [make_grid(F.pad(row, (0, width - row.shape[-1]), value=1.0), nrow=3, pad_value=1.0) for row in rows]
    return tvF.to_pil_image(torch.cat(strips, dim=1))


def draw_comparison(pictures: dict[str, Tensor], side: int = 160, gap: int = 4) -> Image.Image:
    """
    A grid: one row per image, one column per entry under its title.

    Args:
        pictures (`dict[str, Tensor]`): Title to uint8 `(N, 3, S, S)`, equal shapes.
        side (`int`): Smaller images are enlarged, by a whole number and without smoothing, up to this.
    """
    count, _, height, width = next(iter(pictures.values())).shape
    zoom = max(1, side // width)
    width, height, title = width * zoom, height * zoom, 28
    sheet = Image.new("RGB", (len(pictures) * (width + gap) - gap, title + count * (height + gap) - gap), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (name, images) in enumerate(pictures.items()):
        x = column * (width + gap)
        draw.text((x + width / 2, 2), _wrapped(name, width), "black", anchor="ma", align="center", spacing=0)
        for row, image in enumerate(images):
            shown = tvF.to_pil_image(image).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(shown, (x, title + row * (height + gap)))
    return sheet


def _wrapped(text: str, width: int) -> str:
    """`text` in at most two lines that fit in `width` pixels of the default font, about 6 pixels a letter."""
    return "\n".join(textwrap.wrap(text, max(8, width // 6), max_lines=2, placeholder="..."))


def draw_curves(rows: list[dict[str, float]], num_codes: int) -> Image.Image:
    """
    Every figure of the log over steps, one panel each: training as a line, validation as dots.

    Args:
        rows (`list[dict]`): Lines of log.jsonl, each with `step`.
        num_codes (`int`): Drawn as the ceiling of perplexity.
    """
    names = list(dict.fromkeys(name.removeprefix("validation_") for row in rows for name in row if name != "step"))
    names = [name for name in names if name != "num_images" and not name.startswith(("gradient_", "cosine_"))]
    columns = 4
    figure = Figure(figsize=(4 * columns, 2.6 * -(-len(names) // columns)), layout="constrained")
    for axes, name in zip(figure.subplots(-(-len(names) // columns), columns, squeeze=False).flat, names, strict=False):
        for key, style in ((name, "-"), (f"validation_{name}", "o--")):
            points = [(row["step"], row[key]) for row in rows if key in row]
            if points:
                axes.plot(*zip(*points, strict=True), style, markersize=3, linewidth=1)
        if name == "perplexity":
            axes.axhline(num_codes, color="grey", linewidth=0.5)
        axes.set_title(name, fontsize=10)
        axes.tick_params(labelsize=8)
    for axes in figure.axes[len(names) :]:
        axes.set_axis_off()
    return _render(figure)


def draw_gradients(rows: list[dict[str, float]]) -> Image.Image:
    """
    What arrives of each loss's gradient at x̂, z and the encoder's ends: norms over steps above, and
    below the cosine with the sum of all.
    """
    places = {"x_hat": "reconstruction x̂", "z": "latents z", "encoder_first": "encoder, first layer",
              "encoder_last": "encoder, last layer"}  # fmt: skip
    keys = list(dict.fromkeys(name for row in rows for name in row if name.startswith("gradient_z_")))
    terms = [key.removeprefix("gradient_z_") for key in keys]
    figure = Figure(figsize=(4.2 * len(places), 6), layout="constrained")
    norms, cosines = figure.subplots(2, len(places))
    for above, below, (place, title) in zip(norms, cosines, places.items(), strict=True):
        for number, term in enumerate(terms):
            for axes, kind in ((above, "gradient"), (below, "cosine")):
                name = f"{kind}_{place}_{term}"
                points = [(row["step"], row[name]) for row in rows if name in row]
                if points:
                    axes.plot(
                        *zip(*points, strict=True), "o-", markersize=3, linewidth=1, color=f"C{number}", label=term
                    )
        above.set(title=title, yscale="log")
        below.set(xlabel="training step", ylim=(-1.05, 1.05))
    norms[0].set_ylabel("norm of the weighted gradient")
    cosines[0].set_ylabel("cosine with the sum of all")
    norms[1].legend(fontsize=8)
    return _render(figure)


def draw_codebook(model: VQGANModel, counts: Tensor, rows: list[dict[str, float]]) -> Image.Image:
    """
    Three views of the codebook's health: use per code, sorted; perplexity over steps; the first codebook's codes along
    their two principal axes, coloured by use (grey: unused).

    Args:
        counts (`Tensor` of shape `(n*K,)`): Histogram of codes.
        rows (`list[dict]`): Lines of log.jsonl.
    """
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    sorted_use, over_time, map_of_codes = figure.subplots(1, 3)
    shares = counts / counts.sum().clamp(min=1)
    sorted_use.plot(range(1, len(counts) + 1), shares.sort(descending=True).values)
    sorted_use.axhline(1 / len(counts), color="grey", linewidth=0.5)
    sorted_use.set(title="share of positions per code, sorted (grey: all equal)", xlabel="rank")
    sorted_use.set_yscale("symlog", linthresh=0.1 / len(counts))
    points = [(row["step"], row["perplexity"]) for row in rows if "perplexity" in row]
    if points:
        over_time.plot(*zip(*points, strict=True))
    over_time.axhline(model.quantize.num_codes, color="grey", linewidth=0.5)
    over_time.set(title="perplexity (grey: all codes)", xlabel="training step", ylim=(0, None))
    used = counts.view(model.quantize.num_codebooks, -1)[0]
    x, y = principal_coordinates(codebook_vectors(model), 2).cpu().unbind(dim=1)
    map_of_codes.scatter(x[used == 0], y[used == 0], s=4, color="lightgrey")
    dots = map_of_codes.scatter(x[used > 0], y[used > 0], s=4, c=(used[used > 0] / used.sum()).log10())
    figure.colorbar(dots, ax=map_of_codes, label="log10 share of positions")
    map_of_codes.set(title="codes along their principal axes", xlabel="first", ylabel="second")
    return _render(figure)


def _render(figure: Figure) -> Image.Image:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return Image.open(buffer)


def write_picture(file: Path, save: Callable[..., None], **options) -> None:
    """
    Write a file so that it is there whole or not at all.

    Args:
        save (`Callable`): A picture's `save` or a figure's `savefig`, which gets a path and `options`.
    """
    temporary = file.with_name(f".{file.name}")
    save(temporary, **options)
    temporary.replace(file)
