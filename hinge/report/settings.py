"""The configuration as the report shows it: flat, as text, without paths of the machine."""

import re
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

# an absolute path, of Windows too, at the start of a text or after a separator of lists and joined names
_PATH = re.compile(
    r"(?:(?<=^)|(?<=[\s,+=;(\[\"']))(?:file://|~[\w.-]*[/\\]|/(?=[^\s/])|[A-Za-z]:[/\\]|\\\\)[^\s,+;)\]\"']*"
)


def flat_settings(settings: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested settings as `outer.inner` → text, in which a path is its last part only."""
    flat: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= flat_settings(value, f"{prefix}{key}.")
        else:
            flat[without_paths(f"{prefix}{key}")] = _text(value)
    return flat


def without_paths(text: str) -> str:
    """Return a text with every absolute path in it replaced by the path's last part."""
    if _PATH.match(text) and not re.search(r"[,+]", text):
        return _last_part(text)  # a single path, which may contain spaces
    return _PATH.sub(lambda match: _last_part(match[0]), text)


def _last_part(path: str) -> str:
    return PureWindowsPath(path).name or path.rstrip("/\\").rpartition("/")[2] or "…"


def _text(value: Any) -> str:
    """Return a setting as text."""
    if isinstance(value, PurePath):
        return Path(value).name or "…"
    if isinstance(value, list | tuple):
        return ", ".join(_text(item) for item in value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return "–" if value is None else without_paths(str(value))
