"""Write docs/licences.md: the licence of every package that hinge needs, as its metadata tell it.

python docs/licences.py docs/licences.md
"""

import argparse
import re
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

COPYLEFT = re.compile(r"\b(A|L)?GPL|GNU|MPL|EUPL|CeCILL", re.IGNORECASE)
EXPLAINED = {
    "igraph": "extra `cluster`: GPL-2.0-or-later; Leiden clustering needs it, nothing is linked or shipped with hinge",
    "certifi": "MPL-2.0: a list of certificates, unmodified",
    "tqdm": "MPL-2.0 and MIT: unmodified",
    "openslide-python": "LGPL-2.1: loaded at run time, unmodified",
    "openslide-bin": "LGPL-2.1 (OpenSlide) and those of what it is built of: a shared library, unmodified",
}


def needed(extras: set[str]) -> dict[str, set[str]]:
    """Return the installed packages that hinge depends on with some extras, and the extras required of each."""
    found: dict[str, set[str]] = {}
    todo = [("hinge-histology", frozenset(extras))]
    while todo:
        name, asked = todo.pop()
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        for text in requirements:
            requirement = Requirement(text)
            if requirement.marker and not any(
                requirement.marker.evaluate({"extra": extra}) for extra in (asked or {""})
            ):
                continue
            key = re.sub(r"[-_.]+", "-", requirement.name).lower()
            if key not in found or not requirement.extras <= found[key]:
                found.setdefault(key, set()).update(requirement.extras)
                todo.append((key, frozenset(requirement.extras)))
    found.pop("hinge-histology", None)
    return found


def licence(name: str) -> tuple[str, str]:
    """Return version and licence of an installed package."""
    about = metadata.metadata(name)
    found = about.get("License-Expression")
    if not found:
        classes = [c.rpartition(" :: ")[2] for c in about.get_all("Classifier") or [] if c.startswith("License ::")]
        found = ", ".join(c for c in classes if c != "OSI Approved")
    if not found:
        found = (about.get("License") or "").strip().splitlines()[0][:80] if about.get("License") else "not stated"
    return metadata.version(name), found.replace("|", "/")


def table(names: list[str]) -> list[str]:
    rows = ["| package | version | licence |", "| --- | --- | --- |"]
    for name in names:
        try:
            version, found = licence(name)
        except metadata.PackageNotFoundError:
            continue
        rows.append(f"| {name} | {version} | {found} |")
    return rows


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("page", type=Path, help="Markdown file to write")
    page = arguments.parse_args().page
    plain = set(needed({""}))
    extra = set(needed({"", "cluster", "pretrain", "spatialdata", "tensorboard"})) - plain
    lines = [
        "# Licences",
        "",
        "hinge itself is under Apache-2.0. This page is written by `docs/licences.py` from the metadata of the "
        "packages in one environment; none of them is distributed with hinge.",
        "",
        "## Copyleft",
        "",
    ]
    for name in sorted(plain | extra):
        try:
            _, found = licence(name)
        except metadata.PackageNotFoundError:
            continue
        if COPYLEFT.search(found) or name in EXPLAINED:
            where = "needed" if name in plain else "optional"
            lines.append(f"- **{name}** ({where}): {found}. {EXPLAINED.get(name, 'Used unmodified, at run time.')}")
    lines += ["", "## Needed", "", *table(sorted(plain)), "", "## Of the extras", "", *table(sorted(extra)), ""]
    page.write_text("\n".join(lines))
    print(f"licences: {page}")


if __name__ == "__main__":
    main()
