"""Categories of slides that are part of the condition: organ, technology, or another column of the table of slides."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray

from hinge.data.slide import slide_name
from hinge.utils.errors import ConfigError, DataError

UNKNOWN = "unknown"
MOST_INTERACTIONS = 4096
"""Columns, at most, that let categories differ in what features mean."""


@dataclass(frozen=True)
class ConditionTokens:
    """Tokens, their categories on the training slides, and how they are appended to the features of spots.

    A category has a column of its own, 1 less its share where it holds, less its share where another one holds, and 0
    where the category is not known. Its products with the features let a category change what features mean. Where
    these products would be more than `MOST_INTERACTIONS`, the features are summed in groups with alternating signs
    (feature hashing; Weinberger et al., ICML 2009).

    Attributes
    ----------
    shares
        Token → category → share of the training slides whose category is known.
    """

    shares: dict[str, dict[str, float]]

    @classmethod
    def of_slides(cls, names: Sequence[str], slides: Sequence[Mapping[str, str | None]]) -> "ConditionTokens":
        """Return the tokens of training slides, given the category of each token (None: not known).

        Raises
        ------
        DataError
            No slide has a category of one of the tokens.
        """
        shares = {}
        for name in names:
            found = [category for each in slides if (category := each.get(name)) is not None]
            if not found:
                raise DataError(
                    f"condition.tokens names {name}, and no training slide has one: the table of slides needs a column "
                    f"{name}, or the slides obs['{name}']"
                )
            kinds = sorted(set(found))
            shares[name] = {kind: found.count(kind) / len(found) for kind in kinds}
        return cls(shares)

    def __len__(self) -> int:
        return sum(len(kinds) for kinds in self.shares.values())

    def known(self, given: Mapping[str, str | None]) -> NDArray[np.float64]:
        """Return 1 for each category (T,) that a slide has and 0 for the others, NaN for those of unknown tokens."""
        parts = []
        for name, kinds in self.shares.items():
            category = given.get(name)
            if category is not None and category not in kinds:
                category = None
            parts += [np.nan if category is None else float(kind == category) for kind in kinds]
        return np.array(parts)

    def checked(self, given: Mapping[str, str]) -> dict[str, str | None]:
        """Return categories that a user gives, None for `unknown`.

        Raises
        ------
        ConfigError
            A token or a category that the training slides have not.
        """
        for name, category in given.items():
            if name not in self.shares:
                trained = ", ".join(self.shares) or "none"
                raise ConfigError(f"--condition {name}={category}: the model has no token {name}, but {trained}")
            if category not in (*self.shares[name], UNKNOWN):
                raise ConfigError(
                    f"--condition {name}={category}: the training slides have {', '.join(self.shares[name])}; give one "
                    f"of them, or {UNKNOWN}"
                )
        return {name: None if category == UNKNOWN else category for name, category in given.items()}

    def checked_list(self, given: Sequence[str]) -> dict[str, str]:
        """Return TOKEN=CATEGORY pairs of a command line as a mapping; errors as those of `checked`."""
        pairs = [each.partition("=") for each in given]
        for each, (name, equals, category) in zip(given, pairs, strict=True):
            if not (name and equals and category):
                raise ConfigError(f"--condition takes TOKEN=CATEGORY, for example organ=breast, not {each!r}")
        result = {name: category for name, _, category in pairs}
        if len(result) < len(pairs):
            raise ConfigError("--condition names a token more than once")
        self.checked(result)
        return result

    def append(self, features: NDArray[np.float32], given: Mapping[str, str | None]) -> NDArray[np.float32]:
        """Return features (…, d) of a slide with the columns of its categories (…, d + T + T·r)."""
        if not len(self):
            return features
        shares = np.array([share for kinds in self.shares.values() for share in kinds.values()])
        centred = np.nan_to_num(self.known(given) - shares).astype(np.float32)
        summed = _hashed(features, self._width(features.shape[-1]))
        products = (centred[:, None] * summed[..., None, :]).reshape(*features.shape[:-1], -1)
        return np.concatenate(
            [features, np.broadcast_to(centred, (*features.shape[:-1], len(self))), products], axis=-1
        )

    def columns(self, num_columns: int) -> list[NDArray[np.int64]]:
        """Return the numbers of the columns of each token, of `num_columns` that `append` returns."""
        if not len(self):
            return []
        num_features = next(d for d in range(num_columns) if d + len(self) * (1 + self._width(d)) == num_columns)
        width, start, found = self._width(num_features), 0, []
        for kinds in self.shares.values():
            own = np.arange(start, start + len(kinds))
            products = (len(self) + own[:, None] * width + np.arange(width)).ravel()
            found.append(num_features + np.concatenate([own, products]))
            start += len(kinds)
        return found

    def _width(self, num_features: int) -> int:
        return min(num_features, max(1, MOST_INTERACTIONS // len(self)))


def categories_of_slide(slide: AnnData, names: Iterable[str]) -> dict[str, str | None]:
    """Return the category of each token that a slide has, see `category_of_slide`."""
    return {name: category_of_slide(slide, name) for name in names}


def category_of_slide(slide: AnnData, name: str) -> str | None:
    """Return the category of a token that a slide has; None: not known.

    It is a column of the table of slides, a fact of the sample's metadata (HEST-1k: organ, species, technology), or a
    column of `obs` with one value for all spots.
    """
    facts = slide.uns["hinge"]
    for place in (facts.get("metadata"), facts.get("source"), facts):
        if isinstance(place, Mapping) and isinstance(place.get(name), str) and place[name].strip():
            return None if place[name].strip().lower() == UNKNOWN else place[name].strip()
    if name not in slide.obs:
        return None
    found = slide.obs[name].dropna().astype(str).unique()
    if len(found) > 1:
        raise DataError(
            f"slide {slide_name(slide)} has {len(found)} values in obs['{name}'], a token takes one a slide"
        )
    return str(found[0]) if len(found) and found[0].lower() != UNKNOWN else None


def _hashed(features: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    """Return features (…, d) summed in `width` groups, each with a sign that depends on its number."""
    count = features.shape[-1]
    if width >= count:
        return features
    number = np.arange(count, dtype=np.uint64)
    signs = np.where((number * np.uint64(2654435761) >> np.uint64(16)) & np.uint64(1), 1, -1).astype(np.float32)
    padded = np.zeros((*features.shape[:-1], -(-count // width) * width), dtype=np.float32)
    padded[..., :count] = features * signs
    return padded.reshape(*features.shape[:-1], -1, width).sum(axis=-2)
