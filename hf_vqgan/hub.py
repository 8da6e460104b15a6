"""Sharing a run on the Hub: the model in every form that others load, its card, pictures and figures, in one commit."""

import json
import shutil
import tempfile
from pathlib import Path

import torch
import yaml
from huggingface_hub import HfApi

from .image_processing_vqgan import VQGANImageProcessor
from .model_card import add_evaluation, make_model_card
from .modeling_vqgan import VQGANModel

EXTRAS = ("metrics.json", "training_config.yaml", "reconstructions.png", "curves.png", "codebook.png")


def push_run_to_hub(
    output_dir: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    license: str | None = None,
    variant: str | None = None,
    commit_message: str = "Upload VQ-GAN",
) -> str:
    """
    Push what a training run left in `output_dir`: the model with its code, the image processor, the card, pictures,
    figures (and evaluation.json, if there is one) and, for plain codebooks, a `diffusers/` folder that
    `diffusers.VQModel` loads without this package.

    Everything goes up in one commit: after an interrupted upload the repository is as it was, and another call
    finishes the job.

    Args:
        repo_id (`str`): `user/name`, or `name` for the token's user. Created if it does not exist.
        variant (`str`, *optional*):
            Name the weights' files so that `from_pretrained(..., variant=...)` finds them beside others; `"bf16"` and
            `"fp16"` convert them, too.
        license (`str`, *optional*): Licence of the weights, as the Hub names it, for the card.

    Returns:
        `str`: The URL of the commit.

    Raises:
        FileNotFoundError: if `output_dir` does not hold a run with a model and metrics.
    """
    folder = Path(output_dir)
    if missing := [name for name in ("config.json", *EXTRAS) if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} is not a finished run: {', '.join(missing)} missing.")
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(variant, torch.float32)
    model = VQGANModel.from_pretrained(folder, dtype=dtype)
    with tempfile.TemporaryDirectory() as staging:
        model.save_pretrained(staging, variant=variant)
        VQGANImageProcessor.from_pretrained(folder).save_pretrained(staging)
        plain = model.quantize.to_codebook() is not None
        if plain:
            model.to_diffusers().save_pretrained(f"{staging}/diffusers", variant=variant)
        # The run's config.json again: it names the dtype that loading defaults to, which a variant must not change.
        for name in ("config.json", *EXTRAS):
            shutil.copy(folder / name, staging)
        card = make_model_card(
            repo_id,
            settings=yaml.safe_load((folder / "training_config.yaml").read_text()),
            model_config=model.config,
            metrics=json.loads((folder / "metrics.json").read_text()),
            has_diffusers=plain,
            license=license,
        )
        if (folder / "evaluation.json").is_file():
            shutil.copy(folder / "evaluation.json", staging)
            card = add_evaluation(card, json.loads((folder / "evaluation.json").read_text()), repo_id.split("/")[-1])
        card.save(f"{staging}/README.md")
        return api.upload_folder(repo_id=repo_id, folder_path=staging, commit_message=commit_message).commit_url
