"""Keys of a run's configuration in version 0.1, which version 0.2 still reads."""

import copy
import warnings
from typing import Any

from hinge.utils.errors import ConfigError

RENAMED = {
    "data.table": "path",
    "features.neighbours": "neighbourhood",
    "model.gene_path": "gene_factors",
    "training.closed_form_start": "initialisation",
    "sampling.coherent": "spatially_correlated",
    "sampling.corrections": "remasking",
}
_ANY = object()
# keys of version 0.1 that version 0.2 does not have, with the only value that is still accepted
REMOVED: dict[str, Any] = {
    "features.batch_size": _ANY,
    "backbone.lora_rank": 8,
    "backbone.num_value_bins": 64,
    "model.depth": None,
    "model.library_size": None,
    "model.masked_decoding": 0.0,
    "model.standardise_features": True,
    "model.feature_noise": 0.0,
    "model.drop_masked": None,
    "model.num_factors": 8,
    "model.num_slide_factors": 4,
    "diffusion.beta": 3.0,
    "diffusion.tail": 1,
    "sampling.batch_size": _ANY,
    "sampling.order": "random",
    "sampling.temperature": 1.0,
    "training.accumulation": 1,
    "training.decay_at": [0.5, 0.875],
    "training.decay_by": 0.2,
    "training.betas": [0.9, 0.999],
    "training.weight_decay": 0.0,
    "training.max_grad_norm": 1.0,
    "training.warm_start_masked_share": 0.2,
    "backbone.pretrain.epochs": None,
    "backbone.pretrain.accumulation": 1,
    "backbone.pretrain.schedule": "cosine",
    "backbone.pretrain.warmup_steps": 100,
    "backbone.pretrain.decay_at": [0.5, 0.875],
    "backbone.pretrain.decay_by": 0.2,
    "backbone.pretrain.betas": [0.9, 0.999],
    "backbone.pretrain.weight_decay": 0.0,
    "backbone.pretrain.max_grad_norm": 1.0,
    "backbone.pretrain.ema_decay": None,
    "backbone.pretrain.checkpoint_every": _ANY,
    "backbone.pretrain.evaluate_from": 0.0,
    "backbone.pretrain.patience": None,
    "backbone.pretrain.tracker": "none",
    "backbone.pretrain.min_mask_ratio": 0.05,
    "backbone.pretrain.validation_share": 0.1,
}


def update_settings(content: dict[str, Any], name: str, trained: bool) -> dict[str, Any]:
    """Return settings with the keys of this version; one warning names those of version 0.1 among them.

    Raises
    ------
    ConfigError
        A removed key has a value with an effect.
    """
    content, notes = copy.deepcopy(content), []
    for key, new in RENAMED.items():
        section, old = _section_of(content, key)
        if section is not None and old in section:
            value = section.pop(old)
            if value is None and new in section:  # the default of a key that took the place of another one
                continue
            if section.setdefault(new, value) != value:
                raise ConfigError(f"{name}: {key} is now {new}; give one of them")
            notes.append(f"{key} is now {key.rpartition('.')[0]}.{new}")
    for key, neutral in REMOVED.items():
        section, old = _section_of(content, key)
        if section is None or old not in section:
            continue
        used = neutral is not _ANY and section[old] != neutral and not _without_effect(key, section, content)
        if used and not trained:
            raise ConfigError(f"{name}: {key} was removed and {section[old]!r} had an effect; leave it out")
        notes.append(f"{key} is ignored" + (f", it was {section[old]!r}" if used else ""))
        del section[old]
    if notes:
        warnings.warn(f"{name} has settings of version 0.1: {', '.join(notes)}", DeprecationWarning, stacklevel=4)
    return content


def _section_of(content: Any, key: str) -> tuple[dict[str, Any] | None, str]:
    """Return the section of a dotted key, None where there is none, and the last part of the key."""
    *parts, last = key.split(".")
    for part in parts:
        content = content.get(part) if isinstance(content, dict) else None
    return content if isinstance(content, dict) else None, last


def _without_effect(key: str, section: dict[str, Any], content: dict[str, Any]) -> bool:
    """Return whether a removed key has no effect, given the other keys."""
    if key.endswith(("decay_at", "decay_by")):
        return section.get("schedule") != "step"
    if key == "backbone.lora_rank":
        return section.get("tuning") != "lora"
    if key == "backbone.num_value_bins":
        return section.get("path") is not None
    if key == "model.standardise_features":
        features = content.get("features")
        return isinstance(features, dict) and section["standardise_features"] == features.get("standardise_slide", True)
    # with gene factors, tokens of masked genes are dropped
    return key == "model.drop_masked" and section["drop_masked"] == section.get("gene_factors", True)
