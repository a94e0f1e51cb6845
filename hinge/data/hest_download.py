"""Select samples of HEST-1k by its table, and download them from the Hugging Face Hub."""

import logging
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from hinge.utils.errors import ConfigError, DataError

REPOSITORY = "MahmoodLab/hest"
TABLE = "HEST_v1_1_0.csv"
PARTS = ("st/{}.h5ad", "wsis/{}.tif", "metadata/{}.json")

_PAGE = f"https://huggingface.co/datasets/{REPOSITORY}"
_COLUMNS = {
    "ids": "id",
    "organ": "organ",
    "oncotree": "oncotree_code",
    "technology": "st_technology",
    "species": "species",
}
_logger = logging.getLogger(__name__)


def read_sample_table(path: str | Path) -> pd.DataFrame:
    """Read HEST-1k's table, one row per sample.

    Raises
    ------
    DataError
        The file is missing or damaged, or lacks a column that the selection needs.
    """
    try:
        table = pd.read_csv(path, encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a readable table of samples: {error}") from error
    missing = [column for column in _COLUMNS.values() if column not in table]
    if missing:
        raise DataError(f"{path} is not HEST-1k's table of samples: it has no column {missing[0]}")
    return table


def select_samples(
    table: pd.DataFrame,
    ids: Sequence[str] = (),
    organ: Sequence[str] = (),
    oncotree: Sequence[str] = (),
    technology: Sequence[str] = (),
    species: Sequence[str] = (),
) -> pd.DataFrame:
    """Return the rows of the samples that match all given conditions.

    Parameters
    ----------
    table
        Result of `read_sample_table`.
    ids, organ, oncotree, technology, species
        Accepted values, in upper or lower case; empty for all.

    Raises
    ------
    ConfigError
        No condition is given, a value occurs in no sample, or no sample matches all conditions.
    """
    wanted = {"ids": ids, "organ": organ, "oncotree": oncotree, "technology": technology, "species": species}
    wanted = {_COLUMNS[key]: list(values) for key, values in wanted.items() if values}
    if not wanted:
        raise ConfigError("no sample of HEST-1k is selected: give --id, --organ, --oncotree, --technology or --species")
    chosen = pd.Series(True, index=table.index)
    for column, values in wanted.items():
        there = table[column].astype("string").str.lower().fillna("")
        for value in values:
            if not (there == value.lower()).any():
                known = sorted(table[column].dropna().astype(str).unique())
                shown = ", ".join(known[:30]) + (", ..." if len(known) > 30 else "")
                raise ConfigError(f"no sample of HEST-1k has {column} {value!r}; its values are {shown}")
        chosen &= there.isin([value.lower() for value in values])
    if not chosen.any():
        conditions = " and ".join(f"{column} {' or '.join(values)}" for column, values in wanted.items())
        raise ConfigError(f"no sample of HEST-1k has {conditions}")
    return table[chosen]


def download_sample_table(folder: str | Path) -> Path:
    """Download HEST-1k's table into a folder, unless it is there, and return its path.

    Raises
    ------
    DataError
        As `download_samples`.
    """
    return _fetch(TABLE, Path(folder))


def download_samples(ids: Sequence[str], folder: str | Path) -> Path:
    """Download counts, whole-slide images and metadata of samples; existing files are kept.

    Parameters
    ----------
    ids
        Ids of the samples.
    folder
        Folder for the files, in a layout that `read_slide` reads.

    Returns
    -------
    Path
        `folder`.

    Raises
    ------
    DataError
        The hub cannot be reached, access was not granted, or the file does not exist.
    """
    folder = Path(folder)
    names = [part.format(sample) for sample in ids for part in PARTS]
    for name in tqdm(names, desc="HEST-1k", unit="file", disable=None):
        _fetch(name, folder)
    _logger.info("wrote %s (%d samples)", folder, len(ids))
    return folder


def _fetch(name: str, folder: Path) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    # the client logs every retry; failures are raised as exceptions
    huggingface_hub.utils.logging.set_verbosity_error()
    if (folder / name).is_file():  # the hub's client moves a file here when it is complete
        return folder / name
    try:
        return Path(huggingface_hub.hf_hub_download(REPOSITORY, name, repo_type="dataset", local_dir=folder))
    except (errors.GatedRepoError, errors.RepositoryNotFoundError, errors.LocalTokenNotFoundError) as error:
        raise DataError(
            f"HEST-1k needs access: accept its terms at {_PAGE} and log in with `hf auth login` (or set HF_TOKEN)"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        why = (
            "HF_HUB_OFFLINE is set" if huggingface_hub.constants.HF_HUB_OFFLINE else "huggingface.co cannot be reached"
        )
        raise DataError(
            f"{name} cannot be downloaded because {why}: connect to the internet, or copy st/, wsis/ and metadata/ "
            f"of {_PAGE} to {folder}"
        ) from error
    except errors.EntryNotFoundError as error:
        raise DataError(f"{_PAGE} has no file {name}") from error
    except Exception as error:  # the hub's client also raises exceptions of its HTTP library
        raise DataError(f"{name} of {_PAGE} cannot be downloaded: {' '.join(str(error).split())}") from error
