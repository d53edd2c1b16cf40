"""The interpreter of Triton with quick objects: operands get the types, shapes and values that Triton's rules give them."""

from __future__ import annotations

import copy
import os
import sys
from typing import Any

import numpy as np
import pytest

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="triton exists for Linux only"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are not interpreted"),
]
TYPES = ["int8", "int16", "int32", "int64", "uint8", "uint32", "uint64", "float16", "float32", "float64"]
SHAPES = [(), (4,), (1,), (2, 4), (2, 1)]


def tensor(name: str, shape: tuple[int, ...], value: int = 3) -> Any:
    from triton import language
    from triton.runtime.interpreter import TensorHandle

    dtype = getattr(language, name)
    dims = shape or (1,)
    data = (value + np.arange(np.prod(dims))).reshape(dims).astype(name)
    return language.tensor(TensorHandle(data, dtype), language.block_type(dtype, list(shape)) if shape else dtype)


def paired(left: Any, right: Any, *arguments: Any) -> Any:
    from triton.runtime.interpreter import interpreter_semantic

    return interpreter_semantic.binary_op_type_checking_impl(left, right, *arguments)


def kind_of(left: Any, right: Any, divides: bool = False) -> Any:
    """The type that Triton computes with."""
    from triton.runtime.interpreter import interpreter_semantic

    numbers = [isinstance(each, (int, float)) for each in (left, right)]
    types = [interpreter_semantic.to_tensor(each).dtype for each in (left, right)]
    return interpreter_semantic.computation_type_impl(types[0], numbers[0], types[1], numbers[1], divides)


@pytest.mark.parametrize("divides", [False, True])
def test_two_tensors(divides: bool) -> None:
    for left in TYPES:
        for right in TYPES:
            a, b = tensor(left, (2, 4)), tensor(right, (2, 4), 5)
            try:
                kind = kind_of(a, b, divides)
            except TypeError:
                with pytest.raises(TypeError):
                    paired(a, b, False, False, True, divides)
                continue
            for one, given in zip(paired(a, b, False, False, True, divides), (a, b), strict=True):
                assert one.dtype == kind
                assert one.handle.data.tolist() == given.handle.data.tolist()
                assert one.handle.data.itemsize == kind.itemsize


@pytest.mark.parametrize(
    ("left", "right"), [(a, b) for a in SHAPES for b in SHAPES if not a or not b or len(a) == len(b)]
)
def test_shapes(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    expected = np.broadcast_shapes(left, right)
    for types in (("int32", "int32"), ("int32", "float32")):
        found = paired(tensor(types[0], left), tensor(types[1], right))
        for one in found:
            assert tuple(size.value for size in one.shape) == expected
            assert one.numel.value == np.prod(expected, dtype=int)
            assert one.handle.data.shape == (expected or (1,))
            assert one.type.is_block() == bool(expected)


@pytest.mark.parametrize(
    "number", [0, 1, -1, 7, 2**31 - 1, 2**31, 2**40, 0.0, -0.0, 0.5, 1e-40, 1e300, float("inf"), True]
)
@pytest.mark.parametrize("shape", [(), (4,)])
def test_a_number_beside_a_tensor(number: Any, shape: tuple[int, ...]) -> None:
    for name in TYPES:
        given = tensor(name, shape)
        kind = kind_of(given, number)
        limits = (kind.get_int_min_value(), kind.get_int_max_value()) if kind.is_int() else (-np.inf, np.inf)
        if not limits[0] <= number <= limits[1]:
            for operands in ((given, number), (number, given)):
                with pytest.raises(ValueError, match=r"out of range|unsigned"):
                    paired(*operands)
            continue
        one, other = paired(given, number)
        with np.errstate(over="ignore"):
            expected = np.full(shape or (1,), number).astype(other.handle.data.dtype)
        assert one.dtype == other.dtype == kind
        assert other.handle.data.tolist() == expected.tolist()
        assert one.handle.data.tolist() == given.handle.data.tolist()
        first, second = paired(number, given)
        assert (first.handle.data.tolist(), second.handle.data.tolist()) == (
            expected.tolist(),
            one.handle.data.tolist(),
        )


def test_types_are_shared_and_wrong_ones_refused() -> None:
    from triton import language
    from triton.runtime.interpreter import TensorHandle

    one, constant = language.block_type(language.int32, [2, 4]), language.constexpr(4)
    assert one is language.block_type(language.int32, (2, constant))
    assert one is language.block_type(language.float32, [2, 4]).with_element_ty(language.int32)
    assert one != language.block_type(language.int32, [4, 2])
    assert one != language.block_type(language.uint32, [2, 4])
    assert copy.copy(one) == one
    pointers = [language.block_type(language.pointer_type(language.int32, 1, const), [4]) for const in (False, True)]
    assert pointers[0] != pointers[1]
    for shape, error in (([3], ValueError), ([2.0], TypeError), ([], TypeError), ([1 << 21], ValueError)):
        for _ in range(2):
            with pytest.raises(error):
                language.block_type(language.int32, shape)
    with pytest.raises(ValueError, match="exceeds"):
        TensorHandle(np.zeros(4, np.int64), language.int32)
    with pytest.raises(ValueError, match="incompatible"):
        paired(tensor("int32", (2,)), tensor("int32", (4,)))
