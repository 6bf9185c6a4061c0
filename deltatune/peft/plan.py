"""A configuration on a model, field by field: each is kept, or an error."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..core.errors import unknown
from .fields import FIELDS
from .pieces import Plan
from .soft import plan_prefix, plan_prompt
from .starts import is_pissa
from .vectors import plan_norms
from .weights import WEIGHT_METHODS, plan_weights

_BASE_CHANGED = ("pissa", "olora", "corda", "loftq", "lora_ga")


def plan_of(model: nn.Module, fields: dict[str, Any], *, is_file: bool) -> Plan:
    kind = fields.get("peft_type")
    if kind not in FIELDS:
        raise unknown("peft_type", str(kind), FIELDS)
    _check_fields(fields, kind, is_file)
    if kind in WEIGHT_METHODS:
        return plan_weights(model, fields, kind, is_file)
    if kind == "LN_TUNING":
        return plan_norms(model, fields, is_file)
    if kind == "P_TUNING" and not is_file:
        raise ValueError(
            "P_TUNING: the network that makes the prompts is no method here; train it with HF PEFT, its file is read"
        )
    return (plan_prefix if kind == "PREFIX_TUNING" else plan_prompt)(model, fields, is_file)


def plain_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Sets as sorted lists, enumerations as their values."""

    def plain(value: Any) -> Any:
        value = getattr(value, "value", value) if isinstance(value, str) else value
        return sorted(value) if isinstance(value, (set, frozenset)) else value

    return {k: plain(v) for k, v in fields.items()}


def _check_fields(fields: Mapping[str, Any], kind: str, is_file: bool) -> None:
    for key, value in fields.items():
        field = FIELDS[kind].get(key)
        if field is None:
            version = fields.get("peft_version") or "of an unknown version"
            raise ValueError(
                f"{kind}: the field {key!r} is not known here; peft {version} wrote it" if is_file
                else f"{kind}: the field {key!r} of peft {version} is not known here"
            )  # fmt: skip
        if (
            any(value == off and type(value) is type(off) for off in field.off)
            or None in field.off
            and value in ([], {})
        ):
            continue
        if kind == "LORA" and key == "init_lora_weights" and is_pissa(value):
            if is_file and value != "pissa":
                raise ValueError(
                    f"{kind}: init_lora_weights = {value!r} cannot be kept in a file: HF PEFT draws the start anew as it reads, "
                    f"and takes it from the base; convert the file to LoRA with HF PEFT first"
                )
            continue
        if field.kind == "refused" or field.kind == "training" and not is_file:
            raise ValueError(f"{kind}: {key} = {value!r} cannot be kept: {field.text}")
        if key == "init_lora_weights" and str(value).startswith(_BASE_CHANGED):
            raise ValueError(f"{kind}: init_lora_weights = {value!r} cannot be kept: it changes the base's weights")
