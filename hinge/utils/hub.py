"""Download models from the Hugging Face Hub and upload them."""

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import huggingface_hub

from hinge.utils.errors import ConfigError, WeightsError

# the files of a model's repository that are read
PATTERNS = ("*.json", "*.yaml", "*.md", "*.safetensors", "model/*", "backbone/*")

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def is_repository(name: str | Path) -> bool:
    """Return whether a name is that of a repository, `owner/name`, and not of an existing folder."""
    return isinstance(name, str) and _REPOSITORY.fullmatch(name) is not None and not Path(name).exists()


def fetch(repository: str, output: str | Path | None = None, revision: str | None = None) -> Path:
    """Return the folder of a repository's files, from the cache of the Hub or downloaded.

    Parameters
    ----------
    repository
        `owner/name`.
    output
        Folder for the files; None: the cache.
    revision
        Branch, tag or commit; None: the newest.

    Raises
    ------
    WeightsError
        The files are not in the cache and cannot be downloaded.
    """
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision, local_dir=output, allow_patterns=list(PATTERNS)
            )
        )
    except Exception as error:  # the Hub's client and the network raise many kinds of exception
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightsError(
            f"{repository} is no folder, is not in the hub cache and could not be fetched ({reason[:200]}): run "
            f"`hf download {repository}` where there is a network (and `hf auth login` where it is private)"
        ) from error


def find(name: str | Path, part: str) -> Path:
    """Return the folder of a model: the folder itself, or its subfolder `part` if it is that of a whole run.

    Parameters
    ----------
    name
        A folder, or `owner/name` on the Hub.
    part
        `model` or `backbone`.
    """
    folder = fetch(str(name)) if is_repository(name) else Path(name)
    inside = folder / part
    return inside if (inside / "config.json").is_file() and not (folder / "config.json").is_file() else folder


def upload(folder: str | Path, repository: str, private: bool = True, message: str = "Upload") -> str:
    """Upload the files of a folder to a model repository, which is created if needed.

    Returns
    -------
    str
        Address of the repository.

    Raises
    ------
    ConfigError
        The name is not that of a repository, or the Hub refuses.
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
    """Upload the files that `save` writes to a temporary folder, and return the address of the repository."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        save(folder)
        return upload(folder, repository, private)
