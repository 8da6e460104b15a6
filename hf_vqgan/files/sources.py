"""Is there such a model or dataset, here or on the Hub? Asked once, where libraries would ask for file after file."""

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
    Fail at once, with one error, where loading `name` would fail after minutes of retries.

    Args:
        name (`str` or `Path`): A local path, or what is on the Hub.
        kind (`str`): `"model"` or `"dataset"`.
        repo (`str`, *optional*): Its repository there, if the name says more than that.
        cache_dir (`str`, *optional*): Where `datasets` keeps what it has prepared, if not where it usually does.

    Raises:
        FileNotFoundError: if it is neither here nor on the Hub.
        ConnectionError: if it is not here, neither as a path nor in the Hub's cache, and the Hub cannot be reached.
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
            f"{missing}, and the Hub has no {kind} repository {repo}, or not for you: `hf auth login`."
        ) from None
    except (HTTPError, OfflineModeIsEnabled) as error:
        if not _is_cached(repo, kind, cache_dir):
            raise ConnectionError(
                f"{missing}, and the Hub cannot be reached to look for a {kind} repository {repo}: {error}"
            ) from error


def _is_cached(repo: str, kind: str, cache_dir: str | None) -> bool:
    """Whether something of a repository has been downloaded before."""
    if kind == "dataset":
        *owner, own_name = repo.split("/")
        folder = "___".join([*owner, camelcase_to_snakecase(own_name)])
        return any(Path(cache_dir or datasets.config.HF_DATASETS_CACHE).glob(f"{folder}/*/*/*"))
    try:
        snapshot_download(repo, local_files_only=True)
    except LocalEntryNotFoundError:
        return False
    return True
