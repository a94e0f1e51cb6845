"""What the published files of several models have in common: vocabularies, sizes, and names of tensors."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hinge.backbones.gene_matching import listed
from hinge.backbones.state_files import StateFile
from hinge.utils.errors import WeightsError, one_line

_MOST_BYTES = 1 << 28


@dataclass
class Table:
    """The published name of each of our tensors.

    Attributes
    ----------
    names
        Our name → the published one, without a prefix.
    """

    names: dict[str, str] = field(default_factory=dict)

    def add(self, ours: str, theirs: str, bias: bool = True) -> None:
        """Add the weight, and the bias, of a module."""
        for end in ("weight", "bias") if bias else ("weight",):
            self.names[f"{ours}.{end}"] = f"{theirs}.{end}"

    def sources(self, state: StateFile, prefix: str, extras: str) -> dict[str, tuple[str, ...]]:
        """Return for each of our tensors its name in a file.

        Parameters
        ----------
        state
            The file.
        prefix
            In front of every name.
        extras
            Pattern of the names, without prefix, that are known and not needed.

        Raises
        ------
        WeightsError
            A tensor is missing, or one is neither needed nor a known extra.
        """
        found = {ours: prefix + theirs for ours, theirs in self.names.items()}
        missing = [name for name in found.values() if name not in state.shapes]
        if missing:
            raise WeightsError(f"{state.path} lacks {len(missing):,} tensors of the model: {listed(missing)}")
        used = set(found.values())
        unknown = [
            name
            for name in state.shapes
            if name not in used and not (name.startswith(prefix) and re.fullmatch(extras, name.removeprefix(prefix)))
        ]
        if unknown:
            raise WeightsError(
                f"{state.path} has {len(unknown):,} tensors that the model does not use: {listed(unknown)}"
            )
        return {ours: (name,) for ours, name in found.items()}


def prefix_of(state: StateFile, name: str, what: str) -> str:
    """Return what stands in front of a tensor's name, such as `model.`.

    Raises
    ------
    WeightsError
        There is no such tensor.
    """
    found = [each.removesuffix(name) for each in state.shapes if re.fullmatch(rf"(.*\.)?{re.escape(name)}", each)]
    if not found:
        raise WeightsError(
            f"{state.path} holds no {what}: it has no tensor {name}, but {listed(list(state.shapes), 3)}"
        )
    return min(found, key=len)


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file that holds keys and values.

    Raises
    ------
    WeightsError
        The file is missing or damaged.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"{path.parent} holds no {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} cannot be read: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise WeightsError(f"{path} must hold keys and values, not {type(content).__name__}")
    return content


def read_tokens(path: Path) -> dict[str, int]:
    """Return a vocabulary, token → id, of a flat JSON file in any order.

    Raises
    ------
    WeightsError
        The file is missing or damaged, an id is no whole number or stands there twice.
    """
    content = read_json_object(path)
    holder: dict[int, str] = {}
    for token, number in content.items():
        if type(number) is not int or number < 0 or not token.strip():
            raise WeightsError(f"{path}: token {token!r} needs a whole number from 0 as its id, not {number!r}")
        if number in holder:
            raise WeightsError(f"{path}: {holder[number]!r} and {token!r} have the same id {number}")
        holder[number] = token
    if not content:
        raise WeightsError(f"{path} holds no token")
    return content


def tokens_with_specials(id_of: dict[str, int], specials: tuple[str, ...], rows: int, path: Path) -> list[str | None]:
    """Return the tokens in the order of their ids.

    Parameters
    ----------
    id_of
        Id of each token.
    specials
        Tokens that are appended, in this order, where the file lacks them and the table has rows for them.
    rows
        Of the embedding table.
    path
        Of the vocabulary, for errors.

    Raises
    ------
    WeightsError
        The table has too few rows, or `<pad>` or `<cls>` is nowhere.
    """
    tokens: list[str | None] = [None] * (max(id_of.values()) + 1 if max(id_of.values()) < rows else 0)
    if not tokens:
        largest = max(id_of, key=id_of.__getitem__)
        raise WeightsError(
            f"the vocabulary {path} does not belong to these weights: {largest!r} has the id {id_of[largest]:,} and "
            f"there are {rows:,} embeddings"
        )
    for token, number in id_of.items():
        tokens[number] = token
    for special in specials:
        if special not in id_of and len(tokens) < rows:
            tokens.append(special)
    absent = [token for token in ("<pad>", "<cls>") if token not in tokens]
    if absent:
        raise WeightsError(f"the vocabulary {path} has no token {absent[0]}")
    return tokens


def size_of(content: dict[str, Any], key: str, path: Path, of_tensors: int | None = None) -> int:
    """Return a size of a model.

    Parameters
    ----------
    content, key, path
        Published settings, the key of the size, and their file.
    of_tensors
        The size that the tensors have, which is the answer where there is no such key; None if they do not tell.

    Raises
    ------
    WeightsError
        The value is no whole number above 0, or not that of the tensors.
    """
    value = content.get(key, of_tensors)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int or not 0 < value < 2**31:
        raise WeightsError(f"{path}: {key} must be a whole number above 0, not {value!r}")
    if of_tensors not in (None, value):
        raise WeightsError(f"{path}: {key} is {value:,} and the weights have {of_tensors:,}")
    return value


def num_layers(shapes: Iterable[str], stack: str, path: Path) -> int:
    """Return how many layers `<stack>.0`, `<stack>.1` … names of tensors have; a WeightsError if one is missing."""
    found = {int(each[1]) for name in shapes if (each := re.match(rf"{re.escape(stack)}\.(\d+)\.", name))}
    missing = [number for number in range(len(found) + 1) if number not in found]
    if missing[0] < max(len(found), 1):
        raise WeightsError(f"{path} lacks {stack}.{missing[0]}")
    return len(found)


def check_settings(content: dict[str, Any], only: dict[str, Any], path: Path) -> None:
    """Check settings that change what a model computes.

    Parameters
    ----------
    content
        Published settings.
    only
        Dotted key → the only value that can be read, which is the default of the published code.
    path
        Of the settings, for the error.

    Raises
    ------
    WeightsError
        A setting has another value.
    """
    for key, value in only.items():
        found = value_at(content, key, value)
        if type(found) is not type(value) or found != value:
            raise WeightsError(f"{path}: {key} is {found!r}, and only {value!r} can be read")


def value_at(content: dict[str, Any], key: str, default: Any) -> Any:
    """Return the value at a dotted key, the default where there is none."""
    node: Any = content
    for part in key.split("."):
        if not isinstance(node, dict) or node.get(part) is None:
            return default
        node = node[part]
    return node


def weights_of(folder: Path, what: str) -> Path:
    """Return the file of weights in a folder, or the folder where they are in several parts.

    `best_model.pt` goes before others; of other files there must be one.

    Raises
    ------
    WeightsError
        There is none, or it is not clear which one is meant.
    """
    found = sorted(file for end in ("pt", "pth", "bin", "ckpt", "safetensors") for file in folder.glob(f"*.{end}"))
    best = [file for file in found if file.stem == "best_model"][:1] or found
    if len(best) == 1:
        return best[0]
    shards = any(folder.glob("*.safetensors.index.json")) or all("-of-" in file.stem for file in found)
    if found and shards and all(file.suffix == ".safetensors" for file in found):
        return folder
    if not found:
        raise WeightsError(f"{folder} holds no {what}: it has no file of weights (.pt, .pth, .bin or .safetensors)")
    raise WeightsError(f"{folder} holds {len(found)} files of weights: name the one of the {what}, such as {found[0]}")
