"""Models on the Hugging Face Hub: fetching what a name means, and uploading a folder."""

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import huggingface_hub

from hinge.utils.errors import ConfigError, WeightsError

# of a repository with a model, all that is ever read
PATTERNS = ("*.json", "*.yaml", "*.md", "*.safetensors", "model/*", "backbone/*")

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def is_repository(name: str | Path) -> bool:
    """Whether a name is that of a repository, `owner/name`, and not of a folder that is there."""
    return isinstance(name, str) and _REPOSITORY.fullmatch(name) is not None and not Path(name).exists()


def fetch(repository: str, output: str | Path | None = None, revision: str | None = None) -> Path:
    """A repository's files, from the user's hub cache or the hub.

    Parameters
    ----------
    repository
        `owner/name`.
    output
        Folder for them; None for the cache.
    revision
        Branch, tag or commit; None for the newest.

    Raises
    ------
    WeightsError
        They are not in the cache and cannot be fetched.
    """
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision, local_dir=output, allow_patterns=list(PATTERNS)
            )
        )
    except Exception as error:  # hub and network have many ways to say no
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightsError(
            f"{repository} is no folder, is not in the hub cache and could not be fetched ({reason[:200]}): run "
            f"`hf download {repository}` where there is a network (and `hf auth login` where it is private)"
        ) from error


def find(name: str | Path, part: str) -> Path:
    """The folder of a model: itself, or its `part` where `name` is that of a whole run.

    Parameters
    ----------
    name
        A folder, or `owner/name` on the hub.
    part
        `model` or `backbone`.
    """
    folder = fetch(str(name)) if is_repository(name) else Path(name)
    inside = folder / part
    return inside if (inside / "config.json").is_file() and not (folder / "config.json").is_file() else folder


def upload(folder: str | Path, repository: str, private: bool = True, message: str = "Upload") -> str:
    """Upload a folder's files as a model repository, which is made if it is not there.

    Returns
    -------
    str
        The repository's address.

    Raises
    ------
    ConfigError
        The name is none of a repository, or the hub refuses.
    """
    if _REPOSITORY.fullmatch(repository) is None:
        raise ConfigError(f"{repository!r} is not the name of a repository; write owner/name")
    api = huggingface_hub.HfApi()
    try:
        made = api.create_repo(repository, private=private, repo_type="model", exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=str(folder), repo_type="model", commit_message=message)
    except Exception as error:  # not logged in, no network, no permission, no space
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{repository} cannot be uploaded ({reason[:200]}); log in with `hf auth login` and look whether the "
            "name is yours to write to"
        ) from error
    return str(made)


def upload_saved(save: Callable[[Path], object], repository: str, private: bool = True) -> str:
    """Upload what `save` writes into a folder that it is given."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        save(folder)
        return upload(folder, repository, private)
