"""Layers of the base replaced under an adapter that stands, for methods that quantise the base when they start."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from .record import Record
from .runtime import original, swap

if TYPE_CHECKING:
    from .adapter import Adapter

# of a layer's private dicts, those that go with its format
_OWN = ("_parameters", "_buffers", "_load_state_dict_pre_hooks")


def check_alone(adapter: "Adapter") -> None:
    """Raise ValueError where another adapter stands on the model: it would go on around another base."""
    record: Record = adapter.model.__dict__["_deltatune"]
    others = [name for name in record.infos if name != adapter.name]
    if others:
        raise ValueError(
            f"adapter {adapter.name!r} would replace layers under adapter {others[0]!r}, which stands on this model too; "
            f"attach it first, or detach the other"
        )


def rebase(adapter: "Adapter", made: Mapping[str, nn.Module]) -> Callable[[], None]:
    """Let each named layer keep what the made one keeps, and run as it does; what is returned undoes it, bit for bit.

    The module objects, their hooks and the deltas at them stay. Raises ValueError, and changes nothing, where another adapter
    stands on the model.
    """
    check_alone(adapter)
    record: Record = adapter.model.__dict__["_deltatune"]
    before: list[tuple[str, nn.Module, type, dict[str, Any]]] = []
    required = record.required

    def undo() -> None:
        for name, module, cls, kept in before:
            module.__dict__.clear()
            module.__dict__.update(kept)
            swap(module, name, own=cls)
        record.required = required

    try:
        for name, layer in made.items():
            module = adapter.model.get_submodule(name)
            kept = {key: dict(value) if key in _OWN else value for key, value in module.__dict__.items()}
            before.append((name, module, original(module, name)[0], kept))
            _become(module, layer)
            swap(module, name, own=type(layer))
    except BaseException:
        undo()
        raise
    gone = {f"{name}.weight" for name in made}
    record.required = [name for name in required if name not in gone]  # a weight of codes takes no gradient
    return undo


def _become(module: nn.Module, layer: nn.Module) -> None:
    for key, value in layer.__dict__.items():
        if key in _OWN:
            old = module.__dict__[key]
            module.__dict__[key] = {**old, **value} if key.endswith("_hooks") else dict(value)
        elif key not in module.__dict__ or not (key.startswith("_") or key == "training"):
            module.__dict__[key] = value
    for p in module._parameters.values():
        if getattr(p, "module", None) is layer:  # bitsandbytes' weight knows its layer
            p.module = module  # type: ignore[union-attr]
