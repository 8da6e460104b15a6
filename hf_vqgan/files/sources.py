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
