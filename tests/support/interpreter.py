"""Triton's interpreter without what it does again and again: a quarter of its time.

A launch makes `triton.language` compute with arrays, and takes that back at its end. In between, each call of one Triton
function by another does all of it once more, to no effect.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any


def quicken() -> None:
    """Have launches change `triton.language` once, and types be looked up once."""
    from triton import language
    from triton.runtime import interpreter

    changed: set[int] | None = None
    found: dict[str, Any] = {}
    launch, change, look_up = interpreter.GridExecutor.__call__, interpreter._patch_lang, interpreter._get_np_dtype

    @functools.cache
    def seen_by(fn: Any) -> frozenset[int]:
        known = (language, language.core)
        return frozenset(id(value) for value in fn.__globals__.values() if inspect.ismodule(value) and value in known)

    def launch_once(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal changed
        changed = set()
        try:
            return launch(self, *args, **kwargs)
        finally:
            changed = None

    def change_once(fn: Any) -> Any:
        if changed is not None:
            if seen_by(fn) <= changed:
                return interpreter._LangPatchScope()
            changed.update(seen_by(fn))
        return change(fn)

    def look_up_once(dtype: Any) -> Any:
        scalar = dtype.element_ty if isinstance(dtype, language.block_type) else dtype
        if isinstance(scalar, language.pointer_type):
            return look_up(scalar)
        if scalar.name not in found:
            found[scalar.name] = look_up(scalar)
        return found[scalar.name]

    interpreter.GridExecutor.__call__ = launch_once
    interpreter._patch_lang = change_once
    interpreter._get_np_dtype = look_up_once
