"""Sharing a run on the Hub, in one commit: the model in every form that others load, its card, pictures and metrics."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, ModelCard
from transformers.utils import logging

from ..files.documents import read_mapping, read_settings
from ..files.sources import HTTPError
from ..image_processing_vqgan import VQGANImageProcessor
from ..modeling_vqgan import VQGANModel
from ..token_pipeline import VQGANTokenPipeline
from .model_card import (
    add_evaluation,
    is_local,
    make_model_card,
    make_pipeline_card,
    make_token_pipeline_card,
    public_name,
)

EXTRAS = ("metrics.json", "training_config.yaml", "reconstructions.png", "curves.png", "codebook.png")
PIPELINE_EXTRAS = ("metrics.json", "training_config.yaml")
CardMaker = Callable[..., ModelCard]

logger = logging.get_logger(__name__)
VARIANT_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def push_run_to_hub(
    output_dir: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    license: str | None = None,
    variant: str | None = None,
    max_shard_size: int | str | None = None,
    commit_message: str = "Upload VQ-GAN",
) -> str:
    """
    Push what a training run left in `output_dir`: the model with its code, the image processor, the card, pictures,
    metrics (and evaluation.json, if there is one) and, for plain codebooks, a `diffusers/` folder that
    `diffusers.VQModel` loads without this package. Local paths to models and datasets are reduced to their last names.
    A folder with a pipeline is pushed as by `push_pipeline_to_hub`.

    Everything is uploaded in one commit, which also removes the weights of the same variant that it replaces: after an
    interrupted upload the repository is unchanged, and another call completes it.

    Args:
        repo_id (`str`): `user/name`, or `name` for the token's user. Created if it does not exist.
        license (`str`, *optional*):
            License of the weights, as the Hub names it, for the card. Default: what the repository's card already says.
        variant (`str`, *optional*):
            Name the weight files so that `from_pretrained(..., variant=...)` finds them next to others; `"bf16"` and
            `"fp16"` also convert them.
        max_shard_size (`int` or `str`, *optional*):
            Split weights into files of at most this many bytes, or `"5GB"`. Default: that of transformers or diffusers.

    Returns:
        `str`: The URL of the commit.

    Raises:
        FileNotFoundError: if `output_dir` does not hold a run with a model and metrics.
    """
    folder = Path(output_dir)
    is_pipeline = (folder / "model_index.json").is_file()
    if not is_pipeline:
        _check_finished(folder, "config.json", *EXTRAS)
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    saving = {"variant": variant} | ({"max_shard_size": max_shard_size} if max_shard_size else {})
    dtype = VARIANT_DTYPES.get(variant, torch.float32)
    with tempfile.TemporaryDirectory() as temporary:
        staging = Path(temporary)
        stage = _stage_pipeline if is_pipeline else _stage_model
        make_card, weights = stage(folder, staging, dtype, saving)
        hide_paths(staging, folder)
        card = make_card(
            repo_id,
            settings=read_settings(staging / "training_config.yaml"),
            metrics=read_mapping(staging / "metrics.json"),
            license=license or _license_there(api, repo_id),
        )
        if (staging / "evaluation.json").is_file():
            card = add_evaluation(card, read_mapping(staging / "evaluation.json"), repo_id.split("/")[-1])
        card.save(staging / "README.md")
        replaced = [pattern for stem in weights for pattern in _weight_patterns(stem, variant)]
        if not (is_pipeline or (staging / "diffusers").is_dir()):
            replaced.append("diffusers/*")
        return api.upload_folder(
            repo_id=repo_id, folder_path=staging, commit_message=commit_message, delete_patterns=replaced
        ).commit_url


def push_pipeline_to_hub(output_dir: str | Path, repo_id: str, **options) -> str:
    """
    Push what the training of a latent diffusion or token model left in `output_dir`: the pipeline, its card with the
    latest samples, metrics and settings, in one commit. Arguments, result and errors are those of `push_run_to_hub`.

    Raises:
        ValueError: for a variant in shards, which diffusers does not find in a pipeline.
    """
    variant, max_shard_size = options.get("variant"), options.get("max_shard_size")
    if variant is not None and max_shard_size is not None:
        raise ValueError(
            f"variant={variant!r} with max_shard_size={max_shard_size!r}: diffusers' pipelines cannot load a variant "
            "in shards. Leave one of them out."
        )
    _check_finished(Path(output_dir), "model_index.json", *PIPELINE_EXTRAS)
    return push_run_to_hub(output_dir, repo_id, **{"commit_message": "Upload pipeline"} | options)


def push_checkpoint(push: Callable[..., str], *args, last: bool, **options) -> None:
    """
    `push(*args, **options)` in the middle of a training run, which must not end because the Hub cannot be reached: the
    next checkpoint pushes everything again.

    Raises:
        ConnectionError: if the `last` push fails. The training's command then repeats it, since the run is complete.
    """
    try:
        push(*args, **options)
    except (OSError, HTTPError) as error:
        if not last:
            logger.warning(f"the push to the Hub failed and will be repeated at the next checkpoint: {error}")
            return
        raise ConnectionError(
            f"training is complete, but the last push to the Hub failed: {error}. Run the same command again to push."
        ) from error


def _stage_model(folder: Path, staging: Path, dtype: torch.dtype, saving: dict) -> tuple[CardMaker, list[str]]:
    """The files of a model's repository in `staging`; how to make its card; and which weights they replace."""
    model = VQGANModel.from_pretrained(folder, dtype=dtype)
    model.save_pretrained(staging, **saving)
    VQGANImageProcessor.from_pretrained(folder).save_pretrained(staging)
    is_plain = model.quantize.to_codebook() is not None
    if is_plain:
        model.to_diffusers().save_pretrained(staging / "diffusers", **saving)
    # The run's own config.json names the dtype that loading defaults to, which a variant must not change.
    for name in ("config.json", *EXTRAS, "evaluation.json"):
        if (folder / name).is_file():
            shutil.copy(folder / name, staging)
    make_card = partial(make_model_card, model_config=model.config, has_diffusers=is_plain)
    return make_card, ["model", *["diffusers/diffusion_pytorch_model"] * is_plain]


def _stage_pipeline(folder: Path, staging: Path, dtype: torch.dtype, saving: dict) -> tuple[CardMaker, list[str]]:
    """As `_stage_model`, for a pipeline."""
    pipeline = DiffusionPipeline.from_pretrained(folder).to(dtype)
    pipeline.save_pretrained(staging, **saving)
    of_tokens = isinstance(pipeline, VQGANTokenPipeline)
    for part in ("vqvae", "token_model") if of_tokens else ("vqvae",):
        shutil.copy(folder / part / "config.json", staging / part)  # names the default dtype, as above
    for name in PIPELINE_EXTRAS:
        shutil.copy(folder / name, staging)
    samples = sorted(folder.glob("samples-*.png"), key=lambda file: int(file.stem.split("-")[1]))
    if samples:
        shutil.copy(samples[-1], staging / "samples.png")
    make_card = make_token_pipeline_card if of_tokens else make_pipeline_card
    other_weights = "token_model/model" if of_tokens else "denoiser/diffusion_pytorch_model"
    return partial(make_card, pipeline=pipeline, has_samples=bool(samples)), ["vqvae/*model", other_weights]


def _check_finished(folder: Path, *names: str) -> None:
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} is not a finished run: {', '.join(missing)} missing.")


def hide_paths(staging: Path, run: Path) -> None:
    """
    Reduce each local path in the JSON and YAML files in `staging`, copied from the folder `run`, to its last name.
    """
    documents = {file: read_mapping(file) for file in staging.rglob("*.json")}
    documents |= {file: read_settings(file) for file in staging.rglob("*.yaml")}
    names = {text: public_name(text) for content in documents.values() for text in _texts(content) if is_local(text)}
    names[str(run.resolve())] = public_name(str(run))
    for file, content in documents.items():
        hidden = _replace(content, dict(sorted(names.items(), key=lambda pair: -len(pair[0]))))
        if hidden != content:
            as_json = json.dumps(hidden, indent=2) + "\n"
            text = as_json if file.suffix == ".json" else yaml.safe_dump(hidden, sort_keys=False)
            file.write_text(text, encoding="utf-8")


def _texts(content: Any) -> Iterator[str]:
    """All strings in nested lists and dicts."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, (list, dict)):
        for item in content.values() if isinstance(content, dict) else content:
            yield from _texts(item)


def _replace(content: Any, names: dict[str, str]) -> Any:
    """Nested lists and dicts with every string that is a key of `names` replaced, also paths inside longer strings."""
    if isinstance(content, dict):
        return {key: _replace(item, names) for key, item in content.items()}
    if isinstance(content, list):
        return [_replace(item, names) for item in content]
    if isinstance(content, str):
        if content in names:
            return names[content]
        for path, name in names.items():
            content = content.replace(path, name) if "/" in path or "\\" in path else content
    return content


def _license_there(api: HfApi, repo_id: str) -> str | None:
    if not api.file_exists(repo_id, "README.md"):
        return None
    return ModelCard.load(api.hf_hub_download(repo_id, "README.md")).data.license


def _weight_patterns(stem: str, variant: str | None) -> tuple[str, ...]:
    """Patterns of a model's weight files, whole and in shards. Old weights left next to new ones would be loaded."""
    marked = "" if variant is None else f".{variant}"
    return (
        f"{stem}{marked}.safetensors",
        f"{stem}{marked}-?????-of-?????.safetensors",
        f"{stem}.safetensors.index{marked}.json",
    )
