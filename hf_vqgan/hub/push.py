"""Sharing a run on the Hub: what it trained in every form that others load, its card, pictures and figures, in one
commit."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, ModelCard

from ..files.documents import read_mapping, read_settings
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
    figures (and evaluation.json, if there is one) and, for plain codebooks, a `diffusers/` folder that
    `diffusers.VQModel` loads without this package.

    Of folders on this machine, models and datasets among them, only their last names go up.

    Everything goes up in one commit, which also removes weights of the same variant that it replaces: after an
    interrupted upload the repository is as it was, and another call finishes the job.

    Args:
        repo_id (`str`): `user/name`, or `name` for the token's user. Created if it does not exist.
        variant (`str`, *optional*):
            Name the weights' files so that `from_pretrained(..., variant=...)` finds them beside others; `"bf16"` and
            `"fp16"` convert them, too.
        max_shard_size (`int` or `str`, *optional*):
            Split weights into files of at most so many bytes, or `"5GB"`. Default: those of transformers and diffusers.
        license (`str`, *optional*):
            Licence of the weights, as the Hub names it, for the card. Default: what the repository's card says already.

    Returns:
        `str`: The URL of the commit.

    Raises:
        FileNotFoundError: if `output_dir` does not hold a run with a model and metrics.
    """
    folder = Path(output_dir)
    _check_finished(folder, "config.json", *EXTRAS)
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    model = VQGANModel.from_pretrained(folder, dtype=VARIANT_DTYPES.get(variant, torch.float32))
    saving = {"variant": variant} | ({"max_shard_size": max_shard_size} if max_shard_size else {})
    with tempfile.TemporaryDirectory() as staging:
        model.save_pretrained(staging, **saving)
        VQGANImageProcessor.from_pretrained(folder).save_pretrained(staging)
        plain = model.quantize.to_codebook() is not None
        if plain:
            model.to_diffusers().save_pretrained(f"{staging}/diffusers", **saving)
        # The run's config.json again: it names the dtype that loading defaults to, which a variant must not change.
        evaluated = (folder / "evaluation.json").is_file()
        for name in ("config.json", *EXTRAS, *(["evaluation.json"] if evaluated else [])):
            shutil.copy(folder / name, staging)
        hide_paths(Path(staging), folder)
        card = make_model_card(
            repo_id,
            settings=read_settings(Path(staging, "training_config.yaml")),
            model_config=model.config,
            metrics=read_mapping(Path(staging, "metrics.json")),
            has_diffusers=plain,
            license=license or _license_there(api, repo_id),
        )
        if evaluated:
            card = add_evaluation(card, read_mapping(Path(staging, "evaluation.json")), repo_id.split("/")[-1])
        card.save(f"{staging}/README.md")
        other = _weights("diffusers/diffusion_pytorch_model", variant) if plain else ["diffusers/*"]
        replaced = [*_weights("model", variant), *other]
        return _commit(api, repo_id, staging, replaced, commit_message)


def push_pipeline_to_hub(
    output_dir: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    license: str | None = None,
    variant: str | None = None,
    max_shard_size: int | str | None = None,
    commit_message: str = "Upload pipeline",
) -> str:
    """
    Push what the training of a latent diffusion or token model left in `output_dir`: the pipeline, its card with the
    latest samples, figures and settings, in one commit. Arguments, result and errors are those of `push_run_to_hub`.

    Raises:
        ValueError: for a variant in shards, which diffusers does not find in a pipeline.
    """
    folder = Path(output_dir)
    if variant is not None and max_shard_size is not None:
        raise ValueError(
            f"variant={variant!r} with max_shard_size={max_shard_size!r}: diffusers' pipelines cannot load a variant "
            "in shards. Leave one of them out."
        )
    _check_finished(folder, "model_index.json", *PIPELINE_EXTRAS)
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    pipeline = DiffusionPipeline.from_pretrained(folder).to(VARIANT_DTYPES.get(variant, torch.float32))
    of_tokens = isinstance(pipeline, VQGANTokenPipeline)
    saving = {"variant": variant} | ({"max_shard_size": max_shard_size} if max_shard_size else {})
    with tempfile.TemporaryDirectory() as staging:
        pipeline.save_pretrained(staging, **saving)
        for part in ("vqvae", "token_model") if of_tokens else ("vqvae",):
            shutil.copy(folder / part / "config.json", f"{staging}/{part}")  # names the default dtype, as above
        for name in PIPELINE_EXTRAS:
            shutil.copy(folder / name, staging)
        samples = sorted(folder.glob("samples-*.png"), key=lambda file: int(file.stem.split("-")[1]))
        if samples:
            shutil.copy(samples[-1], f"{staging}/samples.png")
        hide_paths(Path(staging), folder)
        make_card = make_token_pipeline_card if of_tokens else make_pipeline_card
        make_card(
            repo_id,
            settings=read_settings(Path(staging, "training_config.yaml")),
            pipeline=pipeline,
            metrics=read_mapping(Path(staging, "metrics.json")),
            has_samples=bool(samples),
            license=license or _license_there(api, repo_id),
        ).save(f"{staging}/README.md")
        other = "token_model/model" if of_tokens else "denoiser/diffusion_pytorch_model"
        replaced = [*_weights("vqvae/*model", variant), *_weights(other, variant)]
        return _commit(api, repo_id, staging, replaced, commit_message)


def _check_finished(folder: Path, *names: str) -> None:
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} is not a finished run: {', '.join(missing)} missing.")


def hide_paths(staging: Path, run: Path) -> None:
    """
    Put the last name of each file and folder on this machine in place of its path, in all JSON and YAML files.

    Args:
        staging (`Path`): Folder with the files, which are changed.
        run (`Path`): The folder that they come from.
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
    """All texts in nested lists and dicts."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, (list, dict)):
        for item in content.values() if isinstance(content, dict) else content:
            yield from _texts(item)


def _replace(content: Any, names: dict[str, str]) -> Any:
    """Nested lists and dicts with each text that is a key of `names` replaced, and paths inside of longer texts too."""
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


def _weights(stem: str, variant: str | None) -> tuple[str, ...]:
    """Patterns of a model's weights, whole and in shards. Left beside new ones, old weights would be loaded."""
    marked = "" if variant is None else f".{variant}"
    return (
        f"{stem}{marked}.safetensors",
        f"{stem}{marked}-?????-of-?????.safetensors",
        f"{stem}.safetensors.index{marked}.json",
    )


def _commit(api: HfApi, repo_id: str, staging: str, replaced: list[str], message: str) -> str:
    return api.upload_folder(
        repo_id=repo_id, folder_path=staging, commit_message=message, delete_patterns=replaced
    ).commit_url
