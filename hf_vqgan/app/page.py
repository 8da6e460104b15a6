"""The page around `playground.py`, made with gradio (the extra `app`), and the files of a Hugging Face Space with it.

The server reads the models named to it and the files uploaded to it, and nothing else: no folder is opened to
visitors (`allowed_paths`), and models are safetensors without code of their own.
"""

import functools
import importlib.metadata
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import gradio as gr
from huggingface_hub import SpaceCardData
from PIL import Image
from torch import Tensor

from ..pipelines import count_classes
from . import playground
from .playground import Canvas, Journey

SHOWN_SIDE = 640  # pixels: pictures are enlarged up to here, so that single codes can be hit
PALETTE_CODES = 96
PAINT, PICK = "paint with the code", "pick up the code"
NO_CLASS = -1
WALK_HEIGHT = 280
SYSTEM_FONT = ("system-ui", "sans-serif")  # gradio's own are fetched from the internet
CSS = """
.clickable img {cursor: crosshair}
.upload img {width: 100%; height: 100%; object-fit: contain}
"""

load_model = functools.lru_cache(maxsize=2)(playground.load_model)
load_pipeline = functools.lru_cache(maxsize=2)(playground.load_pipeline)


def make_page(models: list[str], pipelines: list[str], any_name: bool) -> gr.Blocks:
    """
    The page.

    Args:
        models (`list[str]`): Hub names or folders of [`VQGANModel`]s to choose among.
        pipelines (`list[str]`): The same of [`VQGANLatentDiffusionPipeline`]s.
        any_name (`bool`):
            Whether visitors may name others. They then make the server download what they name, and find out which
            folders it has: for people who may do that anyway.

    Raises:
        ValueError: if nobody could name a model.
    """
    if not (models or any_name):
        raise ValueError("name at least one model: visitors cannot.")
    with gr.Blocks(title="VQ-GAN playground", analytics_enabled=False) as page:
        gr.Markdown(
            "# VQ-GAN playground\nAn image as a grid of codes: see them, exchange them, walk from one image to another."
        )
        with gr.Row(equal_height=True):
            name = _name_box("Model", models, any_name, "model")
            side = gr.Slider(64, 1024, 256, step=32, label="Longest side", info="Larger pictures are reduced to it.")
            about = gr.Markdown(elem_id="about")
        _on([page.load, name.change], _describe_model, [name], [about])
        with gr.Tab("Codes", id="codes"):
            _codes_tab(name, side)
        with gr.Tab("Walk", id="walk"):
            _walk_tab(name, side)
        if pipelines or any_name:
            with gr.Tab("Sample", id="sample"):
                _sample_tab(page, pipelines, any_name)
    return page


def launch(page: gr.Blocks, **arguments) -> None:
    """Serve the page; `arguments` are those of `gradio.Blocks.launch`."""
    theme = gr.themes.Default(primary_hue="indigo", font=SYSTEM_FONT, font_mono=("ui-monospace", "monospace"))
    settings = {"theme": theme, "css": CSS, "footer_links": [], "max_file_size": "20mb"}
    closed = {"allowed_paths": [], "enable_monitoring": False, "mcp_server": False, "ssr_mode": False, "pwa": False}
    page.launch(**settings | closed | arguments)


def _name_box(label: str, names: list[str], any_name: bool, elem_id: str) -> gr.Dropdown:
    info = "A Hub name or a folder; type another and press Enter." if any_name else None
    return gr.Dropdown(
        names, value=names[0] if names else None, label=label, info=info, allow_custom_value=any_name, elem_id=elem_id
    )


def _on(triggers: list, function: Callable, inputs: list, outputs: list, **arguments) -> None:
    """Call `function` on events; what it says about bad input is shown in the page."""

    @functools.wraps(function)
    def shown(*values):
        try:
            return function(*values)
        except (ValueError, OSError) as error:
            raise gr.Error(str(error), print_exception=False) from error

    gr.on(triggers, shown, inputs, outputs, api_visibility="private", **arguments)


def _describe_model(name: str | None) -> str:
    if not name:
        return "Name a model to begin."
    model = load_model(name)
    config = model.config
    codes = "one code" if model.quantize.num_codebooks == 1 else f"{config.num_codebooks} codes"
    return (
        f"Each square of {config.downsample_factor} x {config.downsample_factor} pixels becomes {codes} out of "
        f"**{config.num_vq_embeddings:,}** (quantizer `{config.quantizer}`). {model.num_parameters() / 1e6:.1f} M "
        f"parameters, trained at {config.sample_size} pixels."
    )


# Codes: reconstruct an image and edit its codes.


def _picture(caption: str, elem_id: str, **arguments) -> gr.Image:
    """A picture under its caption, in a column of its own."""
    defaults = {"format": "png", "interactive": False, "buttons": ["download"], "height": 380}
    with gr.Column(min_width=160):
        gr.Markdown(caption)
        return gr.Image(label=caption, show_label=False, elem_id=elem_id, **defaults | arguments)


def _upload(caption: str, elem_id: str, **arguments) -> gr.Image:
    # image_mode=None: transparency and 16 bits are the image processor's business
    settings = {"type": "pil", "sources": ["upload", "clipboard"], "image_mode": None, "elem_classes": "upload"}
    return _picture(caption, elem_id, **settings | {"interactive": True, "buttons": []} | arguments)


def _codes_tab(name: gr.Dropdown, side: gr.Slider) -> None:
    canvas = gr.State()
    with gr.Row():
        uploaded = _upload("Your picture", "original")
        picture = _picture("Decoded from its codes", "reconstruction", elem_classes="clickable")
        codes = _picture("Its codes (similar colours: similar codes)", "code-map", elem_classes="clickable")
    facts = gr.Markdown(elem_id="facts")
    with gr.Row(equal_height=True):
        click = gr.Radio([PAINT, PICK], value=PAINT, label="A click on either picture will")
        code = gr.Number(0, label="Code", precision=0, minimum=0, elem_id="code")
        brush = gr.Slider(1, 15, 1, step=1, label="Brush", info="Codes to each side of a square", elem_id="brush")
        codebook = gr.Number(0, label="Codebook", precision=0, minimum=0, visible=False)
        with gr.Column(min_width=120):
            back = gr.Button("Undo", size="md", elem_id="undo")
            restore = gr.Button("Undo all", size="md", elem_id="reset")
    caption = (
        f"The {PALETTE_CODES} commonest codes of this picture, each as it looks on average: click on one to pick it up"
    )
    palette = _picture(caption, "palette", elem_classes="clickable", buttons=[], height=130)

    views = [canvas, picture, codes, palette, facts]
    _on([uploaded.change, name.change, side.release], _open, [name, uploaded, side], [*views, codebook, code])
    _on([codebook.change], _show, [canvas, codebook], views)
    clicked = [canvas, click, code, brush, codebook]
    _on([picture.select, codes.select], _click, clicked, [*views, code], show_progress="hidden")
    _on([palette.select], _pick_from_palette, [canvas, codebook], [code], show_progress="hidden")
    _on([back.click], _undo, [canvas, codebook], views)
    _on([restore.click], _reset, [canvas, codebook], views)


def _open(name: str, image: Image.Image | None, longest_side: int) -> tuple:
    """The views of a new picture, and which codebook and code are chosen: the first, and the picture's commonest."""
    if image is None or not name:
        return (*[None] * 5, 0, 0)
    model = load_model(name)
    canvas = playground.open_canvas(model, playground.fit_image(model, image, longest_side))
    several = gr.Number(0, maximum=model.quantize.num_codebooks - 1, visible=model.quantize.num_codebooks > 1)
    commonest = int(playground.code_patches(canvas, 1)[0])
    return *_show(canvas, 0), several, commonest


def _show(canvas: Canvas | None, codebook: int) -> tuple:
    if canvas is None:
        return (None,) * 5
    times = playground.magnification(canvas.sample, SHOWN_SIDE)
    return (
        canvas,
        playground.to_image(canvas.sample, times),
        playground.to_image(playground.code_map(canvas, codebook), times),
        playground.draw_palette(_palette(canvas, codebook)[1]),
        _facts(canvas),
    )


def _palette(canvas: Canvas, codebook: int) -> tuple[Tensor, Tensor]:
    return playground.code_patches(canvas, PALETTE_CODES, codebook)


def _facts(canvas: Canvas) -> str:
    figures = playground.measure(canvas)
    rows, columns = canvas.indices.shape[1:3]
    text = (
        f"**{columns} x {rows} positions**, {figures.distinct:,} different codes: {figures.bytes / 1000:,.1f} kB "
        f"instead of {canvas.pixels.numel() / 1000:,.1f} kB of pixels. PSNR **{figures.psnr:.1f} dB**."
    )
    if not figures.edited:
        return text
    share = figures.changed_pixels / canvas.pixels[0, 0].numel()
    return f"{text} Edited: {figures.edited:,}, which changes {figures.changed_pixels:,} pixels ({share:.1%})."


def _click(canvas: Canvas, click: str, code: int, brush: int, codebook: int, event: gr.SelectData) -> tuple:
    """Paint the code where the click was, or pick up the code that is there: the views, and the code."""
    rows, columns = canvas.indices.shape[1:3]
    cell = canvas.sample.shape[2] // rows * playground.magnification(canvas.sample, SHOWN_SIDE)
    x, y = event.index
    row, column = playground.cell_at(x, y, cell, rows, columns)
    if click == PICK:
        return *[gr.skip()] * 5, int(playground.codebook_indices(canvas, codebook)[0, row, column])
    return *_show(playground.paint(canvas, row, column, code, brush, codebook), codebook), code


def _pick_from_palette(canvas: Canvas, codebook: int, event: gr.SelectData) -> int:
    codes = _palette(canvas, codebook)[0]
    x, y = event.index
    return int(codes[playground.patch_at(x, y, len(codes))])


def _undo(canvas: Canvas | None, codebook: int) -> tuple:
    return _show(canvas and playground.undo(canvas), codebook)


def _reset(canvas: Canvas | None, codebook: int) -> tuple:
    return _show(canvas and playground.reset(canvas), codebook)


# Walk: from one image to another.


def _walk_tab(name: gr.Dropdown, side: gr.Slider) -> None:
    journey = gr.State()
    with gr.Row():
        start = _upload("From", "from", height=WALK_HEIGHT)
        pictures = [
            _picture("Pixels averaged", "pixels", height=WALK_HEIGHT),
            _picture("Codes averaged", "codes", height=WALK_HEIGHT),
            _picture("Nearest codes", "nearest", height=WALK_HEIGHT),
        ]
        end = _upload("To", "to", height=WALK_HEIGHT)
    position = gr.Slider(0, 1, 0.5, step=0.02, label="Position on the way", elem_id="position")
    gr.Markdown(
        "*Pixels averaged* is a mere cross-fade. *Codes averaged* decodes the mean of both pictures' codes. *Nearest "
        "codes* averages the latents and decodes the codes nearest to them: each step is a picture made of codes."
    )
    inputs = [name, start, end, side, position]
    _on([start.change, end.change, name.change, side.release], _open_walk, inputs, [journey, *pictures])
    settings = {"show_progress": "hidden", "trigger_mode": "always_last"}
    _on([position.input], _show_walk, [journey, position], pictures, **settings)


def _open_walk(
    name: str, start: Image.Image | None, end: Image.Image | None, longest_side: int, position: float
) -> tuple:
    if not name or start is None or end is None:
        return (None,) * 4
    model = load_model(name)
    journey = playground.open_journey(model, playground.fit_pair(model, start, end, longest_side))
    return journey, *_show_walk(journey, position)


def _show_walk(journey: Journey | None, position: float) -> tuple:
    if journey is None:
        return (None,) * 3
    times = playground.magnification(journey.pixels, SHOWN_SIDE)
    return tuple(playground.to_image(pixels, times) for pixels in playground.walk(journey, position))


# Sample: images from a pipeline.


def _sample_tab(page: gr.Blocks, pipelines: list[str], any_name: bool) -> None:
    with gr.Row(equal_height=True):
        name = _name_box("Pipeline", pipelines, any_name, "pipeline")
        label = gr.Dropdown([("any", NO_CLASS)], value=NO_CLASS, label="Class", elem_id="class")
        guidance = gr.Slider(1, 8, 2, step=0.5, label="Guidance towards the class", elem_id="guidance")
    with gr.Row(equal_height=True):
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed")
        steps = gr.Slider(1, 200, 30, step=1, label="Steps", elem_id="steps")
        count = gr.Slider(1, 16, 4, step=1, label="Pictures", elem_id="count")
    button = gr.Button("Sample", variant="primary", elem_id="draw")
    pictures = gr.Gallery(label="Samples", show_label=False, columns=4, height="auto", format="png", elem_id="samples")
    _on([page.load, name.change], _list_classes, [name], [label])
    _on([button.click], _sample, [name, label, guidance, seed, steps, count], [pictures])


def _list_classes(name: str | None) -> gr.Dropdown:
    if not name:
        return gr.skip()
    pipeline = load_pipeline(name)
    names = pipeline.config.id2label or {}
    classes = [
        (f"{number} {names.get(str(number), '')}".strip(), number) for number in range(count_classes(pipeline.denoiser))
    ]
    return gr.Dropdown([("any", NO_CLASS), *classes], value=NO_CLASS, interactive=bool(classes))


def _sample(
    name: str | None,
    label: int,
    guidance: float,
    seed: int,
    steps: int,
    count: int,
    progress=gr.Progress(track_tqdm=True),  # noqa: B008, how gradio hands over its progress bar
) -> list[Image.Image]:
    if not name:
        raise ValueError("Name a pipeline first.")
    images = playground.sample_images(
        load_pipeline(name), count, None if label == NO_CLASS else label, seed, steps, guidance
    )
    times = max(1, SHOWN_SIDE // 2 // max(images[0].size))
    return [image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST) for image in images]


# Space: the page on the Hub.

SPACE_APP = '''"""Made by hf-vqgan app --space. Visitors choose among these models; they cannot name others."""

from hf_vqgan.app.page import launch, make_page

page = make_page(models={models!r}, pipelines={pipelines!r}, any_name=False)

if __name__ == "__main__":
    launch(page)
'''


def write_space(folder: Path, models: list[str], pipelines: list[str]) -> None:
    """
    Write what a Hugging Face Space with this page consists of: README.md with its settings, requirements.txt, app.py,
    and a copy of this package.

    Raises:
        ValueError: if no model is named, or one is a folder of this machine.
        FileExistsError: if `folder` has files in it.
    """
    if not models:
        raise ValueError("name at least one model: visitors cannot.")
    if local := [name for name in (*models, *pipelines) if Path(name).exists()]:
        raise ValueError(f"{', '.join(local)}: a folder of this machine; a Space needs the name of a model on the Hub.")
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: name a new folder.")
    requirements = [line for line in importlib.metadata.requires("hf_vqgan") or () if "extra ==" not in line]
    settings = SpaceCardData(
        title="VQ-GAN playground",
        sdk="gradio",
        sdk_version=gr.__version__,  # the Space installs gradio itself
        python_version=f"{sys.version_info.major}.{sys.version_info.minor}",
        app_file="app.py",
        license="apache-2.0",
        models=[*models, *pipelines],
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as partial:
        space = Path(partial, "space")
        shutil.copytree(Path(__file__).parent.parent, space / "hf_vqgan", ignore=shutil.ignore_patterns("__pycache__"))
        (space / "app.py").write_text(SPACE_APP.format(models=models, pipelines=pipelines))
        (space / "requirements.txt").write_text("\n".join(requirements) + "\n")
        (space / "README.md").write_text(f"---\n{settings}\n---\n\nA playground for image tokenizers.\n")
        space.replace(folder)
    print(
        f"{folder} is ready. To publish it:\n"
        f"  hf repos create USER/NAME --type space --sdk gradio\n  hf upload USER/NAME {folder} . --type space"
    )
