"""Speeds up the objects of Triton's interpreter: a kernel of ten lines makes thousands of them.

block types     The same object for the same element type and shape, and the same shape for all element types.
tensors         What depends on the type alone is computed once for each type.
handles         One function makes and checks one, instead of four.
operands        Those of one type and shape are not promoted, cast or broadcast; a number next to them becomes one at once.
comparisons     A type is equal to itself, and what is no `constexpr` is unwrapped: nothing else is looked at.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def quicken_types() -> None:
    """Change the classes for good. Values, types and errors stay as they are."""
    from triton import language
    from triton.language import semantic
    from triton.runtime import interpreter

    core = language.core
    _share_block_types(core)
    _quicken_tensors(core)
    _quicken_comparisons(core)
    _quicken_handles(core, interpreter)
    _quicken_operands(core, semantic.TritonSemantic, interpreter)


def _share_block_types(core: Any) -> None:
    made: dict[Any, Any] = {}
    shapes: dict[Any, Any] = {}
    block_type, dtype, pointer_type, constexpr = core.block_type, core.dtype, core.pointer_type, core.constexpr
    original = block_type.__init__

    def key_of(element: Any, shape: Any) -> Any:
        """What tells block types apart, or None for elements that are not known here."""
        kind = element.__class__
        if kind is dtype:
            name: Any = element.name
        elif kind is pointer_type and element.element_ty.__class__ is dtype:
            name = (element.name, element.address_space, element.const)
        else:
            return None
        key = [name]
        for size in shape.values if shape.__class__ is core.tuple else shape:
            size = size.value if size.__class__ is constexpr else size
            if size.__class__ is not int:
                return None
            key.append(size)
        return (*key,)

    def find(cls: Any, element_ty: Any = None, shape: Any = None) -> Any:  # a copy gives neither
        found = made.get(key_of(element_ty, shape)) if cls is block_type else None
        return object.__new__(cls) if found is None else found

    def fill(self: Any, element_ty: Any, shape: Any) -> None:
        if "numel" in self.__dict__:
            return
        original(self, element_ty, shape)
        key = key_of(element_ty, self.shape) if self.__class__ is block_type else None
        if key is not None:
            self.shape = shapes.setdefault(key[1:], self.shape)
            made[key] = self

    block_type.__new__ = find
    block_type.__init__ = fill


def _quicken_tensors(core: Any) -> None:
    original = core.tensor.__init__

    def fill(self: Any, handle: Any, type: Any) -> None:
        known = type.__dict__.get("_of_tensors")
        if known is None:
            original(self, handle, type)
            type._of_tensors = self.shape, self.numel, self.dtype
            return
        self.handle, self.type = handle, type
        self.shape, self.numel, self.dtype = known

    core.tensor.__init__ = fill


def _quicken_comparisons(core: Any) -> None:
    unwrap, constexpr, true = core._unwrap_if_constexpr, core.constexpr, core.constexpr(True)
    plain = {core.tensor, core.dtype, core.block_type, core.pointer_type, int, float, bool, str, type(None)}

    def unwrap_once(value: Any) -> Any:
        kind = value.__class__
        if kind in plain:
            return value
        return value.value if kind is constexpr else unwrap(value)

    def identity_first(cls: Any, same: Any) -> None:
        original = cls.__eq__
        cls.__eq__ = lambda self, other: same if self is other else original(self, other)

    def item(self: Any, index: Any) -> Any:
        return self.values[index] if index.__class__ is int else original_item(self, index)

    original_item = core.tuple.__getitem__
    core._unwrap_if_constexpr = unwrap_once
    for cls in (core.dtype, core.pointer_type, core.block_type):
        identity_first(cls, True)
    identity_first(core.tuple, true)
    core.tuple.__getitem__ = item


def _quicken_handles(core: Any, interpreter: Any) -> None:
    pointer_type, block_type = core.pointer_type, core.block_type
    handle, builder = interpreter.TensorHandle, interpreter.InterpreterBuilder
    splat = builder.create_splat

    def fill(self: Any, data: Any, dtype: Any, attr: Any = None) -> None:
        self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr
        if dtype.__class__ is not pointer_type and data.itemsize > (dtype.itemsize or 1):
            self.__post_init__()  # raises

    def compute(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        output, dtype = op(lhs.data, rhs.data), lhs.dtype.scalar
        if dtype.__class__ is not pointer_type and output.itemsize > (dtype.itemsize or 1):
            output = output.astype(interpreter._get_np_dtype(dtype))
        return handle(output, dtype)

    def spread(self: Any, ret_ty: Any, arg: Any) -> Any:
        if arg.dtype.__class__ is block_type:
            return splat(self, ret_ty, arg)
        data = np.empty((*ret_ty.shape.values,), dtype=interpreter._get_np_dtype(arg.dtype))
        data[...] = arg.data
        return handle(data, arg.dtype.scalar)

    handle.__init__ = fill
    builder.binary_op = compute
    builder.create_splat = spread


def _quicken_operands(core: Any, semantic: Any, interpreter: Any) -> None:
    tensor, block_type, dtype, pointer_type = core.tensor, core.block_type, core.dtype, core.pointer_type
    handle, builder = interpreter.TensorHandle, interpreter.interpreter_builder
    check, broadcast = semantic.binary_op_type_checking_impl, semantic.broadcast_impl_value
    constant, convert = semantic.scalar_constant, semantic.to_tensor
    whole = {f"{sign}int{bits}" for bits in (8, 16, 32, 64) for sign in ("", "u")}
    real = {"fp32", "fp64"}
    signed = {"int32": 1 << 31, "int64": 1 << 63}
    numbers = whole | real

    def to_tensor(self: Any, x: Any, check_type: bool = True) -> Any:
        return x if x.__class__ is tensor and self.tensor is tensor else convert(self, x, check_type)

    def scalar_constant(self: Any, value: Any, dtype: Any) -> Any:
        if self.builder is not builder or dtype.__class__ is not core.dtype or dtype.name not in numbers:
            return constant(self, value, dtype)
        data = np.array([value if value != 0 else 0], dtype=interpreter._get_np_dtype(dtype))
        return tensor(handle(data, dtype), dtype)

    def as_one(self: Any, number: Any, scalar: Any) -> Any:
        """A tensor of a number that does not change the type `scalar` of the other operand, or None."""
        name = scalar.name
        if number.__class__ is int:
            limit = signed.get(name) or (1 << 31 if name in real else 0)
            return self.scalar_constant(number, scalar) if -limit <= number < limit else None
        return self.scalar_constant(number, scalar) if number.__class__ is float and name in real else None

    def operands(
        self: Any,
        lhs: Any,
        rhs: Any,
        allow_lhs_ptr: bool = False,
        allow_rhs_ptr: bool = False,
        arithmetic_check: bool = True,
        div_or_mod: bool = False,
    ) -> Any:
        left, right = lhs, rhs
        if self.builder is builder:
            if left.__class__ is not tensor and right.__class__ is tensor and right.dtype.__class__ is dtype:
                left = as_one(self, left, right.dtype) if arithmetic_check else None
            elif right.__class__ is not tensor and left.__class__ is tensor and left.dtype.__class__ is dtype:
                right = as_one(self, right, left.dtype) if arithmetic_check else None
            if left.__class__ is tensor and right.__class__ is tensor:
                a, b = left.dtype, right.dtype
                if (a is b and a.name in numbers) or (
                    allow_lhs_ptr and a.__class__ is pointer_type and b.__class__ is dtype and b.name in whole
                ):
                    return self.broadcast_impl_value(left, right)
        return check(self, lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)

    def broadcast_once(self: Any, lhs: Any, rhs: Any) -> Any:
        a, b = lhs.type, rhs.type
        if a is b or a.shape_or_none is b.shape_or_none:
            return lhs, rhs
        if self.builder is builder:
            if b.__class__ is dtype or b.__class__ is pointer_type:
                b = a.with_element_ty(b)
                return lhs, tensor(builder.create_splat(b, rhs.handle), b)
            if a.__class__ is dtype or a.__class__ is pointer_type:
                a = b.with_element_ty(a)
                return tensor(builder.create_splat(a, lhs.handle), a), rhs
        return broadcast(self, lhs, rhs)

    dtype.shape_or_none = None
    block_type.shape_or_none = property(lambda self: self.shape)
    semantic.to_tensor = to_tensor
    semantic.scalar_constant = scalar_constant
    semantic.binary_op_type_checking_impl = operands
    semantic.broadcast_impl_value = broadcast_once
