"""A tiny model with LoRA adapters of PEFT, and all changes of adapters that a user may make between two decode steps.

steps_around_changes     prompt, steps, change, steps, change back, steps, with one cache; the same for two twins of a model
CHANGES                  name -> (first change, second change)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils.hotswap import hotswap_adapter

from tests.support.zoo import build_model, random_tokens

STEPS = 3
"""Steps between two changes: an eager one, a captured one and a replay."""
PROMPT = 70
_TARGETS = ["q_proj", "v_proj", "down_proj"]

Change = Callable[[Any, Path], Any]


def _config(rank: int) -> peft.LoraConfig:
    return peft.LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=_TARGETS, init_lora_weights=False)


def adapted_model(family: str = "llama") -> Any:
    """A fresh float32 model with the adapters "default" (active) and "other"; the same weights every time."""
    base = build_model(family)
    torch.manual_seed(6)
    model = peft.get_peft_model(base, _config(4))
    model.add_adapter("other", _config(2))
    return model.eval()


def saved_adapter(folder: Path) -> Path:
    """The folder of an adapter of the rank of "default", with other weights."""
    torch.manual_seed(7)
    peft.get_peft_model(build_model("llama"), _config(4)).save_pretrained(folder)
    return folder


def tuned(model: Any) -> list[Any]:
    """The layers that PEFT has wrapped."""
    return [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]


def _scale(factor: float) -> Change:
    def change(model: Any, folder: Path) -> None:
        for layer in tuned(model):
            layer.scale_layer(factor)

    return change


def _write(model: Any, folder: Path) -> None:
    for layer in tuned(model):
        layer.lora_B["default"].weight.data.mul_(-1)


def _replace(model: Any, folder: Path) -> None:
    for layer in tuned(model):
        layer.lora_B["default"].weight.data = layer.lora_B["default"].weight.data * -1


def _load(model: Any, folder: Path) -> None:
    model.load_adapter(folder, "third")
    model.set_adapter("third")


def _delete(model: Any, folder: Path) -> None:
    model.set_adapter("default")
    model.delete_adapter("third")


def _hook(model: Any, folder: Path) -> None:
    layer = tuned(model)[0]
    layer.user_hook = layer.register_forward_hook(lambda module, args, output: output * 2)


CHANGES: dict[str, tuple[Change, Change]] = {
    "disabled": (
        lambda model, folder: model.base_model.disable_adapter_layers(),
        lambda model, folder: model.base_model.enable_adapter_layers(),
    ),
    "another": (
        lambda model, folder: model.set_adapter("other"),
        lambda model, folder: model.set_adapter("default"),
    ),
    "both": (
        lambda model, folder: model.base_model.set_adapter(["default", "other"]),
        lambda model, folder: model.base_model.set_adapter(["other"]),
    ),
    "scaled": (_scale(-2), _scale(0.25)),
    "merged": (
        lambda model, folder: model.merge_adapter(),
        lambda model, folder: model.unmerge_adapter(),
    ),
    "merged_and_another": (
        lambda model, folder: (model.merge_adapter(), model.set_adapter("other")),
        lambda model, folder: (model.unmerge_adapter(), model.set_adapter("default")),
    ),
    "written": (_write, _write),
    "replaced": (_replace, _replace),
    "loaded": (_load, _delete),
    "swapped": (
        lambda model, folder: hotswap_adapter(model, str(folder), "default", torch_device=str(model.device)),
        lambda model, folder: model.set_adapter("other"),
    ),
    "weighted": (
        lambda model, folder: (
            model.add_weighted_adapter(["default", "other"], [1.5, -1.0], "mixed", combination_type="cat"),
            model.set_adapter("mixed"),
        ),
        lambda model, folder: model.set_adapter("default"),
    ),
    "hooked": (_hook, lambda model, folder: tuned(model)[0].user_hook.remove()),
    "unloaded": (
        lambda model, folder: model.merge_and_unload(),
        lambda model, folder: peft.inject_adapter_in_model(_config(4), model.get_base_model().requires_grad_(False)),
    ),
}


@torch.no_grad()
def steps_around_changes(
    model: Any, cache: Any, change: tuple[Change, ...], folder: Path, seen: Callable[[], Any]
) -> torch.Tensor:
    """Logits [batch, 3 * STEPS, vocabulary] of the steps.

    Args:
        change: the changes after the first steps, and after the next ones.
        folder: of a saved adapter.
        seen: called after each group of steps.
    """
    tokens = random_tokens(2, PROMPT + 3 * STEPS, 3).to(model.device)
    model(tokens[:, :PROMPT], past_key_values=cache)
    logits = []
    for index, token in enumerate(tokens[:, PROMPT:].split(1, 1)):
        if index in (STEPS, 2 * STEPS):
            seen()
            torch.manual_seed(8)
            change[index // STEPS - 1](model, folder)
        logits.append(model(token, past_key_values=cache).logits)
    seen()
    return torch.cat(logits, 1).float()
