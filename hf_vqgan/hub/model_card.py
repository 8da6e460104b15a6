"""README.md of a pushed model or pipeline: what it is, how good, how to load it, how it was made."""

import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..configuration_vqgan import VQGANConfig
from ..measurement.protocol import Protocol
from ..modeling_token_model import AutoregressiveTokenModel
from ..pipelines import VQGANLatentDiffusionPipeline
from ..token_pipeline import VQGANTokenPipeline

TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

An image tokenizer: {{ resolution }}x{{ resolution }} pixels become {{ side }}x{{ side }} codes out of
{{ "{:,}".format(codes) }} (quantizer `{{ quantizer }}`, f{{ factor }}), and images again. Trained with hf_vqgan.

![original, reconstruction, code map](reconstructions.png)

Rows: original | reconstruction | code map (similar codes have similar colours).

## Quality

| metric | value | measured on |
|---|---|---|
{% for row in metrics %}| {{ row.name }} | {{ row.value }} | {{ row.on }} |
{% endfor %}
![use of the codebook](codebook.png)

## Loading

```python
from hf_vqgan import VQGANImageProcessor, VQGANModel

model = VQGANModel.from_pretrained("{{ repo_id }}")
processor = VQGANImageProcessor.from_pretrained("{{ repo_id }}")
indices = model.encode_indices(processor(image, return_tensors="pt")["pixel_values"])
image = processor.postprocess(model.decode_indices(indices).sample)[0]
```

Without the package, its code travels with the model (needs transformers and diffusers):

```python
model = transformers.AutoModel.from_pretrained("{{ repo_id }}", trust_remote_code=True)
```
{% if has_diffusers %}
As a stock diffusers autoencoder:

```python
vae = diffusers.VQModel.from_pretrained("{{ repo_id }}", subfolder="diffusers")
```
{% endif %}
## Training

Data: {{ dataset }}. Settings: [training_config.yaml](training_config.yaml). Curves:
[curves.png](curves.png).

```bash
hf-vqgan train --config training_config.yaml
```
"""

# name in metrics.json -> (title, type on the Hub, digits)
TRAINING_METRICS = {
    "psnr": ("PSNR (dB)", "psnr", 2),
    "ssim": ("SSIM", "ssim", 3),
    "lpips": ("LPIPS", "lpips", 3),
    "perplexity": ("codebook perplexity", "perplexity", 0),
    "usage": ("codebook usage", "codebook-usage", 3),
}

# name in evaluation.json -> (title, type on the Hub, digits)
EVALUATION_FIGURES = {
    "bits_per_pixel": ("bits per pixel", "bits-per-pixel", 4),
    "psnr": ("PSNR (dB)", "psnr", 2),
    "ssim": ("SSIM", "ssim", 4),
    "lpips_alex": ("LPIPS (alex)", "lpips", 4),
    "lpips_vgg": ("LPIPS (vgg)", "lpips-vgg", 4),
    "rfid": ("rFID", "fid", 3),
    "ris": ("rIS", "inception-score", 2),
    "perplexity": ("perplexity", "perplexity", 1),
    "usage": ("usage", "codebook-usage", 4),
}
EVALUATION_HEADING = "## Evaluation"


def make_model_card(
    repo_id: str, settings: dict, model_config: VQGANConfig, metrics: dict, has_diffusers: bool, license: str | None
) -> ModelCard:
    """
    The card of a trained model.

    Args:
        repo_id (`str`): Where it will be found, `user/name`.
        settings (`dict`): training_config.yaml of its run.
        metrics (`dict`): metrics.json of its run.
        has_diffusers (`bool`): Whether the repository has a `diffusers/` folder.
        license (`str`, *optional*): License of the weights, as the Hub names it.
    """
    dataset_name = settings["dataset_name"]
    on_hub = _on_hub(dataset_name)
    data = ModelCardData(
        license=license,
        library_name="hf_vqgan",
        pipeline_tag="image-to-image",
        tags=["vqgan", "vq-vae", "image-tokenizer", "transformers", "diffusers"],
        datasets=[dataset_name] if on_hub else None,
        model_name=repo_id.split("/")[-1],
        eval_results=[
            EvalResult(
                task_type="image-to-image",
                dataset_type=dataset_name if on_hub else "local",
                dataset_name=dataset_name,
                metric_type=kind,
                metric_name=title,
                metric_value=round(metrics[name], 4),
            )
            for name, (title, kind, _) in TRAINING_METRICS.items()
        ],
    )
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        name=repo_id.split("/")[-1],
        repo_id=repo_id,
        resolution=settings["resolution"],
        side=settings["resolution"] // model_config.downsample_factor,
        codes=model_config.num_vq_embeddings,
        quantizer=model_config.quantizer,
        factor=model_config.downsample_factor,
        metrics=[
            {"name": title, "value": f"{metrics[name]:.{digits}f}", "on": measured_on(metrics, name)}
            for name, (title, _, digits) in TRAINING_METRICS.items()
        ],
        has_diffusers=has_diffusers,
        dataset=_link(dataset_name, "datasets/"),
    )


def measured_on(metrics: dict, figure: str) -> str:
    """What a figure of a metrics.json was measured on. Earlier versions wrote that sentence itself."""
    of_codes = figure in ("perplexity", "usage")
    if "measured_on" in metrics:
        return metrics["measured_on"]["perplexity, usage" if of_codes else "psnr, ssim, lpips, l1, validation_*"]
    protocol = Protocol.from_dict(metrics["protocol"])
    return protocol.describe_codes() if of_codes else protocol.describe()


def update_model_card(folder: Path, evaluation: dict) -> ModelCard:
    """
    The card of a model's folder, created if there is none, with the results of an evaluation added.

    Replaces results on the same dataset, split and resolution in its metadata, and its section "Evaluation".

    Args:
        evaluation (`dict`): The model's own evaluation.json: metrics by name, and `protocol`.
    """
    file, name = folder / "README.md", folder.resolve().name
    if file.is_file():
        card = ModelCard.load(file)
    else:
        data = ModelCardData(library_name="hf_vqgan", pipeline_tag="image-to-image", model_name=name)
        card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {name}\n")
    return add_evaluation(card, evaluation, name)


def add_evaluation(card: ModelCard, evaluation: dict, model_name: str) -> ModelCard:
    """`card` with the results of `evaluation`, an evaluation.json, in its metadata and its section "Evaluation"."""
    protocol = evaluation["protocol"]
    on_hub = _on_hub(protocol["dataset"])
    shown = {name: row for name, row in EVALUATION_FIGURES.items() if name in evaluation}
    found = [
        EvalResult(
            task_type="image-to-image",
            dataset_type=protocol["dataset"] if on_hub else "local",
            dataset_name=protocol["dataset"],
            dataset_config=protocol["dataset_config"],
            dataset_split=protocol["split"],
            dataset_revision=protocol["dataset_commit"],
            metric_type=kind,
            metric_name=title,
            metric_value=round(evaluation[name], 6),
            metric_args={key: protocol[key] for key in ("num_images", "resolution")},
        )
        for name, (title, kind, _) in shown.items()
    ]
    before = card.data.eval_results or []
    card.data.eval_results = [old for old in before if not any(old.is_equal_except_value(new) for new in found)] + found
    card.data.model_name = card.data.model_name or model_name
    rows = [f"| {title} | {evaluation[name]:.{digits}f} |" for name, (title, _, digits) in shown.items()]
    # Earlier versions wrote sentences there.
    prose = isinstance(protocol["resize"], str)
    cut = f"{protocol['resize']}; {protocol['crop']}" if prose else Protocol.from_dict(protocol).describe_cut()
    text = (
        f"{protocol['num_images']} images of {protocol['dataset']}, split {protocol['split']}, "
        f"{protocol['resolution']}x{protocol['resolution']} pixels ({cut}), against the same crops. The whole protocol "
        "is in [evaluation.json](evaluation.json)."
    )
    section = "\n".join([EVALUATION_HEADING, "", text, "", "| metric | value |", "|---|---|", *rows, ""])
    # From the heading to the next one of its level, or to the end
    old = re.compile(rf"^{EVALUATION_HEADING}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    body = old.sub("", card.text).rstrip("\n")
    card.text = f"{body}\n\n{section}"
    return card


PIPELINE_TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

{{ "Class-conditional" if classes else "Unconditional" }} latent diffusion at {{ side }}x{{ side }} pixels: a
`{{ denoiser }}` of {{ millions }} M parameters on the latents of a VQ-GAN. Trained with hf_vqgan.
{% if has_samples %}
![samples](samples.png)
{% if classes %}
One row per class, in the order below{% if guidance != 1 %}; guidance {{ guidance }}{% endif %}.
{% endif %}{% endif %}
## Loading

Needs hf_vqgan, which registers the pipeline with diffusers.

```python
import hf_vqgan
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{{ repo_id }}")
images = pipeline({% if classes %}class_labels={{ classes[:2] }}, guidance_scale={{ guidance }}{% else %}batch_size=4{%
endif %}, num_inference_steps={{ steps }}).images
```
{% if classes %}
Classes: {{ classes | join(", ") }}.
{% endif %}
## Training

VQ-GAN: {{ vqgan }}. Data: {{ dataset }}. Objective: {{ objective }}; {{ "{:,}".format(metrics.steps) }} steps of
{{ settings.train_batch_size }} x {{ settings.gradient_accumulation_steps }} samples per process, last loss
{{ "%.4f" | format(metrics.loss) }}. Settings: [training_config.yaml](training_config.yaml).

```bash
hf-vqgan train-diffusion --config training_config.yaml
```
"""


def make_pipeline_card(
    repo_id: str,
    settings: dict,
    pipeline: VQGANLatentDiffusionPipeline,
    metrics: dict,
    has_samples: bool,
    license: str | None,
) -> ModelCard:
    """
    The card of a trained latent diffusion pipeline; arguments as for `make_model_card`.

    Args:
        has_samples (`bool`): Whether the repository has a picture `samples.png`.
    """
    dataset_name, vqgan = settings["dataset_name"], settings["vqgan"]
    classes = list((pipeline.config.id2label or {}).values())
    tags = ["vqgan", "latent-diffusion", "hf_vqgan"]
    denoiser = pipeline.denoiser
    return ModelCard.from_template(
        _pipeline_card_data(repo_id, settings, bool(classes), tags, license),
        template_str=PIPELINE_TEMPLATE,
        name=repo_id.split("/")[-1],
        repo_id=repo_id,
        classes=classes,
        side=denoiser.config.sample_size * pipeline.vqvae.config.downsample_factor,
        denoiser=type(denoiser).__name__,
        millions=round(sum(parameter.numel() for parameter in denoiser.parameters()) / 1e6, 2),
        has_samples=has_samples,
        guidance=settings["sample_guidance_scale"],
        steps=settings["sample_inference_steps"],
        objective=settings["objective"],
        vqgan=_link(vqgan),
        dataset=_link(dataset_name, "datasets/"),
        metrics=metrics,
        settings=settings,
    )


TOKEN_PIPELINE_TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

{{ "Class-conditional" if classes else "Unconditional" }} images of {{ side }}x{{ side }} pixels from {{ tokens }}
tokens of a VQ-GAN: {{ "an autoregressive" if autoregressive else "a masked" }} model of {{ millions }} M parameters.
Trained with hf_vqgan.
{% if has_samples %}
![samples](samples.png)
{% if classes %}
One row per class, in the order below{% if guidance != 1 %}; guidance {{ guidance }}{% endif %}.
{% endif %}{% endif %}
## Loading

Needs hf_vqgan, which registers the pipeline with diffusers.

```python
import hf_vqgan
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{{ repo_id }}")
images = pipeline({{ call }}).images
```
{% if classes %}
Classes: {{ classes | join(", ") }}.
{% endif %}{% if autoregressive %}
`pipeline.token_model.bits(indices, class_labels)` is an image's exact code length in bits.
{% endif %}
## Training

VQ-GAN: {{ vqgan }}. Data: {{ dataset }}. {{ "{:,}".format(metrics.steps) }} steps of {{ settings.train_batch_size }} x
{{ settings.gradient_accumulation_steps }} samples per process, last loss {{ "%.4f" | format(metrics.loss) }}.{{ bits }}
Settings: [training_config.yaml](training_config.yaml).

```bash
hf-vqgan train-tokens --config training_config.yaml
```
"""


def make_token_pipeline_card(
    repo_id: str,
    settings: dict,
    pipeline: VQGANTokenPipeline,
    metrics: dict,
    has_samples: bool,
    license: str | None,
) -> ModelCard:
    """The card of a trained pipeline of tokens; arguments as for `make_pipeline_card`."""
    classes = list((pipeline.config.id2label or {}).values())
    model, side = pipeline.token_model, pipeline.token_model.config.sample_size
    autoregressive = isinstance(model, AutoregressiveTokenModel)
    guidance = settings["sample_guidance_scale"]
    arguments: dict = {"class_labels": classes[:2], "guidance_scale": guidance} if classes else {"num_images": 4}
    arguments |= {name: settings[f"sample_{name}"] for name in ("temperature", "top_k", "top_p")}
    if not autoregressive:
        arguments["num_inference_steps"] = settings["sample_inference_steps"]
    return ModelCard.from_template(
        _pipeline_card_data(repo_id, settings, bool(classes), ["vqgan", "image-tokens", "hf_vqgan"], license),
        template_str=TOKEN_PIPELINE_TEMPLATE,
        name=repo_id.split("/")[-1],
        repo_id=repo_id,
        classes=classes,
        side=side * pipeline.vqvae.config.downsample_factor,
        tokens=" x ".join(map(str, model.config.grid_shape)),
        autoregressive=autoregressive,
        millions=round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2),
        has_samples=has_samples,
        guidance=guidance,
        call=", ".join(f"{name}={value!r}" for name, value in arguments.items()),
        vqgan=_link(settings["vqgan"]),
        dataset=_link(settings["dataset_name"], "datasets/"),
        metrics=metrics,
        settings=settings,
        bits=_describe_bits(metrics, bool(classes)),
    )


def _describe_bits(metrics: dict, has_classes: bool) -> str:
    """A sentence about the likelihood, if it was measured."""
    for name, at_most in (("bits_per_image", ""), ("bits_per_image_upper_bound", "at most ")):
        if name in metrics:
            images = f"{metrics['likelihood_images']:,} images of split `{metrics['likelihood_split']}`"
            given = ", given their class" if has_classes else ""
            return f" Tokens of {images} take {at_most}{metrics[name]:.1f} bits per image{given}."
    return ""


def _pipeline_card_data(
    repo_id: str, settings: dict, has_classes: bool, tags: list[str], license: str | None
) -> ModelCardData:
    dataset_name, vqgan = settings["dataset_name"], settings["vqgan"]
    return ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag=None if has_classes else "unconditional-image-generation",
        tags=tags,
        datasets=[dataset_name] if _on_hub(dataset_name) else None,
        base_model=vqgan if _on_hub(vqgan) else None,
        model_name=repo_id.split("/")[-1],
    )


def _on_hub(name: str) -> bool:
    """Whether a model or dataset is named `user/name`, as on the Hub, and not by a path."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~", "package:")) and not Path(name).exists()


def is_local(name: str) -> bool:
    """Whether a text names something on this machine: an absolute, home or relative path, or one that exists."""
    return bool(re.match(r"/|~|\.{1,2}(/|$)|[A-Za-z]:\\", name)) or (len(name) < 256 and Path(name).exists())


def public_name(name: str) -> str:
    """What to call a model or dataset in public: its name on the Hub, or the last part of its local path."""
    return Path(name).expanduser().resolve().name or "local" if is_local(name) else name


def _link(name: str, prefix: str = "") -> str:
    return f"[{name}](https://huggingface.co/{prefix}{name})" if _on_hub(name) else f"`{name}`"
