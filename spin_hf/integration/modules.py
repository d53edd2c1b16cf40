"""All modules of a model, for checks before every prompt. `nn.Module.modules` also builds their names, which takes longer."""

from __future__ import annotations

from torch import nn


def modules_of(model: nn.Module) -> list[nn.Module]:
    """The model and all modules inside it, each once, the outer ones first."""
    found, level = {model: None}, [model]
    while level:
        inside = [child for module in level for child in module._modules.values() if child is not None]
        level = [child for child in dict.fromkeys(inside) if child not in found]
        found.update(dict.fromkeys(level))
    return list(found)
