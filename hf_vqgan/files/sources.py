"""Whether a model or dataset exists, locally or on the Hub: one request, where libraries would retry file by file."""

from pathlib import Path

import datasets
from datasets.naming import camelcase_to_snakecase
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

HTTPError: type[Exception] = HfHubHTTPError.__bases__[0]  # of the HTTP library that this huggingface_hub uses
TIMEOUT = 10.0  # seconds


def check_source(name: str | Path, kind: str = "model", repo: str | None = None, cache_dir: str | None = None) -> None:
    """
    Fail immediately, with one error, if loading `name` would fail after minutes of retries.

    Args:
        name (`str` or `Path`): A local path, or a name on the Hub.
        kind (`str`): `"model"` or `"dataset"`.
        repo (`str`, *optional*): Its repository, if the name is longer than that.
        cache_dir (`str`, *optional*): Cache folder of `datasets`, if not the default.

    Raises:
        FileNotFoundError: if it exists neither locally nor on the Hub.
        ConnectionError: if it is neither a local path nor cached, and the Hub cannot be reached.
    """
    if Path(name).exists():
        return
    repo = str(name) if repo is None else repo
    missing = f"{kind} {str(name)!r}: no such file or folder here"
    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise FileNotFoundError(f"{missing}, and names on the Hub have the form owner/name.") from None
    try:
        HfApi().repo_info(repo, repo_type=kind, timeout=TIMEOUT)
    except RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{missing}, and the Hub has no {kind} repository {repo}, or it is private: `hf auth login`."
        ) from None
    except (HTTPError, OfflineModeIsEnabled) as error:
        if not _is_cached(repo, kind, cache_dir):
            raise ConnectionError(
                f"{missing}, and the Hub cannot be reached to look for a {kind} repository {repo}: {error}"
            ) from error


def check_model_folder(name: str | Path) -> None:
    """
    As `check_source`, and a local folder must hold a model that `from_pretrained` reads.

    Raises:
        FileNotFoundError: if it does not; it says where the model is, if that is known.
    """
    check_source(name)
    folder = Path(name)
    if folder.exists() and not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"model {str(name)!r} has no config.json, so it is not a model's folder. "
            + (where_model_is(folder) or "For other projects' files, see docs/checkpoints.md.")
        )


def where_model_is(folder: Path) -> str | None:
    """Of a folder that a run has written, and which holds no model itself, the one that does; `None` of others."""
    if (folder / "vqvae" / "config.json").is_file():
        return f"It is a pipeline, whose tokenizer is {folder / 'vqvae'}."
    if folder.name.startswith("checkpoint-") and (folder / "manifest.json").is_file():
        return f"It is a run's checkpoint; the run's model is {folder.parent}."
    return None


def _is_cached(repo: str, kind: str, cache_dir: str | None) -> bool:
    """Whether any part of a repository has been downloaded before."""
    if kind == "dataset":
        *owner, own_name = repo.split("/")
        folder = "___".join([*owner, camelcase_to_snakecase(own_name)])
        return any(Path(cache_dir or datasets.config.HF_DATASETS_CACHE).glob(f"{folder}/*/*/*"))
    try:
        snapshot_download(repo, local_files_only=True)
    except LocalEntryNotFoundError:
        return False
    return True
