"""YAML files of settings, and `key=value` overrides of them.

Ten lines apply the overrides. omegaconf would be one more dependency, and it resolves `${...}` in untrusted files.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from hinge.utils import checksums
from hinge.utils.errors import ConfigError

_MOST_BYTES, _MOST_VALUES = 1 << 18, 100_000


def read_settings(
    path: str | Path, overrides: list[str] | None = None, paths: Sequence[tuple[str, ...]] = ()
) -> dict[str, Any]:
    """Read a YAML file of keys and values and apply overrides, as `load_config`; `paths` are keys that hold paths."""
    path = Path(path)
    try:
        content = parse_yaml(checksums.verified(path).read_bytes())
    except FileNotFoundError as error:
        raise ConfigError(f"there is no configuration file {path}") from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold keys and values, such as output: runs/mine")
    for keys in paths:
        section = content
        for key in keys[:-1]:
            section = section.get(key) if isinstance(section, dict) else None
        if isinstance(section, dict) and isinstance(section.get(keys[-1]), str):
            section[keys[-1]] = _beside(path, section[keys[-1]])
        elif isinstance(section, dict) and isinstance(named := section.get(keys[-1]), dict):
            section[keys[-1]] = {
                key: _beside(path, each) if isinstance(each, str) else each for key, each in named.items()
            }
    for override in overrides or []:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"{override!r} is not an override; write key=value, e.g. training.epochs=10")
        try:
            value = parse_yaml(text)
        except (ValueError, RecursionError, yaml.YAMLError) as error:
            raise ConfigError(f"the value of {key} is not YAML: {text!r}") from error
        keys = key.split(".")
        section = content
        for part in keys[:-1]:
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise ConfigError(f"{key} cannot be set: {part} is not a section")
        section[keys[-1]] = value
    return content


def _beside(path: Path, name: str) -> str:
    """Return the path of a file that is named relative to another file's folder."""
    return str(path.absolute().parent / os.path.expanduser(name))


def parse_yaml(text: bytes | str) -> Any:
    """Return the content of a YAML text of plain values.

    Raises
    ------
    ValueError, RecursionError, yaml.YAMLError
        It is not YAML, or far too large; aliases count, of which nine levels of nine make a thousand million values.
    """
    if len(text) > _MOST_BYTES:
        raise ValueError(f"it has {len(text):,} bytes, and no settings have more than {_MOST_BYTES:,}")
    content = yaml.safe_load(text)
    sizes: dict[int, int | None] = {}

    def size(node: Any) -> int:
        if not isinstance(node, dict | list):
            return 1
        if id(node) not in sizes:
            sizes[id(node)] = None
            parts = [*node.keys(), *node.values()] if isinstance(node, dict) else node
            sizes[id(node)] = 1 + sum(size(part) for part in parts)
        known = sizes[id(node)]
        if known is None or known > _MOST_VALUES:
            raise ValueError("its aliases make it contain itself, or too many values")
        return known

    size(content)
    return content
