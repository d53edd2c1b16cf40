"""Speeds up Triton's interpreter: leaves out work whose results it drops, which is most of its time.

calls       A launch patches `triton.language` to compute with arrays, and restores it at its end. In between, each call of one
            Triton function by another patches it again, to no effect.
overflow    Each sum and product of whole numbers is computed again in 64 bits, for an assertion that is disabled.
tuples      Each shape gets a type with a name, which nothing reads.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import replace
from typing import Any

from tests.support.quick_types import quicken_types


def quicken() -> None:
    """Change the interpreter for good. What kernels compute stays as it is."""
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

    def make_tuple(self: Any, args: Any, type: Any = None) -> None:
        self.values = list(args)
        if type is not None:
            self.type = type if isinstance(type, language.core.tuple_type) else language.core.tuple_type(type)

    def type_of(self: Any) -> Any:
        if "_type" not in vars(self):
            self._type = language.core._type_for_tuple_values(self.values)
        return self._type

    wrapper, semantic = language.core.builtin(lambda: None).__code__, interpreter.interpreter_semantic
    members: dict[Any, list[tuple[str, Any]]] = {}

    def given_semantic(fn: Any) -> Any:
        def member(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = semantic
            return fn(*args, **kwargs)

        return member

    def change_members(owner: Any, builder: Any, scope: Any) -> None:
        if owner not in members:
            found = [(name, fn) for name, fn in inspect.getmembers(owner) if language.core.is_builtin(fn)]
            members[owner] = [
                (name, given_semantic(fn.__wrapped__ if getattr(fn, "__code__", None) is wrapper else fn))
                for name, fn in found
            ]
        for name, member in members[owner]:
            scope.set_attr(owner, name, member)

    interpreter._patch_builtin = change_members
    language.core.tuple.__init__ = make_tuple
    language.core.tuple.type = property(type_of, lambda self, type: vars(self).update(_type=type))
    options = interpreter.interpreter_builder.options
    if not options.debug:  # else the assertion is on
        interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)
    quicken_types()
    interpreter.GridExecutor.__call__ = launch_once
    interpreter._patch_lang = change_once
    interpreter._get_np_dtype = look_up_once
