"""A progress bar while a model on a CPU reads a prompt, inside `generate` and pipelines too."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm

LEAST_TOKENS = 64


def show_progress(model: Any) -> None:
    """Show a bar, layer by layer, in every forward of `model` with at least `LEAST_TOKENS` tokens.

    Does nothing for a model on a GPU: prompts are read fast there, and hooks would keep `SpinCache` from replaying CUDA graphs.
    """
    if model.device.type != "cpu":
        return
    layers = model.get_decoder().layers
    bars: list[tqdm[Any]] = []

    def begin(_: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        ids = args[0] if args else options.get("input_ids")
        if ids is not None and ids.shape[1] >= LEAST_TOKENS:
            bars.append(tqdm(total=len(layers), desc=f"reading {ids.shape[1]:,} tokens", unit=" layers"))

    def advance(*_: Any) -> None:
        if bars:
            bars[-1].update()

    def end(*_: Any) -> None:
        while bars:
            bars.pop().close()

    model.register_forward_pre_hook(begin, with_kwargs=True)
    for layer in layers:
        layer.register_forward_hook(advance)
    model.register_forward_hook(end, always_call=True)
