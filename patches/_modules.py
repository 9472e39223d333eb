"""Finding and replacing submodules."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def replace_modules(model: nn.Module, kind: type[ModuleT], make: Callable[[ModuleT], nn.Module]) -> nn.Module:
    """Replace every submodule of exactly `kind`, in place, by what `make` gives for it; returns `model`.

    Raises LookupError where there is none: a transform that finds nothing to change no longer fits the model.
    """
    found = [(name, module) for name, module in model.named_modules() if type(module) is kind]
    if not found:
        raise LookupError(f"no {kind.__name__} to replace in {type(model).__name__}")
    for name, module in found:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, make(module))
    return model
