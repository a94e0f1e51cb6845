"""The base of settings that a user writes."""

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

LARGEST_SEED = 2**32 - 1
"""The largest seed that all libraries take."""


class Settings(BaseModel):
    """Settings that refuse keys that do not exist, infinities, and a truth value in place of a number.

    YAML reads yes and on as True, which pydantic takes for 1.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[info.field_name] if info.field_name else None
        if isinstance(value, bool) and field is not None and _takes_number(field.annotation):
            raise ValueError(f"it takes a number, not {value}")
        return value


def _takes_number(annotation: Any) -> bool:
    return annotation in (int, float) or any(map(_takes_number, get_args(annotation)))
