"""Layout of a page in its row: the model's dtype, or int8 with one scale per key and one per value.

    PageLayout    [ P * Dk keys | P * Dv values ]                                            in the model's dtype
    Int8Layout    [ P * Dk keys | P * Dv values | unused | P key scales | P value scales ]     int8, scales float32
                  x ~ code * scale;  scale = max |x| of the vector / 127;  rows are multiples of 16 bytes

A scale covers one vector of one token. So a token is appended without changing other tokens, and tokens are permuted as bytes,
without decoding. float32 scales cover the range of every model dtype and cost 8 bytes a token: 3 % of 256 int8 numbers.

Readers always get decoded values in the model's dtype. The Triton kernels encode and decode in `kernels/common.py`, bitwise
equal to this file for finite numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.reference import quantize, split_pages

SCALES_BYTES = 8
"""Bytes of a token's scales: two float32."""
_ALIGNED_BYTES = 16


class Conversion(NamedTuple):
    """Converts rows to another shape and dtype.

    Attributes:
        row_shape, dtype: of the converted rows.
        convert: maps old rows [n, *old row_shape] to new rows [n, *row_shape].
    """

    row_shape: tuple[int, ...]
    dtype: torch.dtype
    convert: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class PageLayout:
    """Pages in the model's dtype.

    Attributes:
        page_size: tokens per page, P.
        key_dim, value_dim: elements of a key and of a value, Dk and Dv.
        dtype: of decoded keys and values.
    """

    page_size: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype

    @property
    def row_dtype(self) -> torch.dtype:
        """Dtype of a row."""
        return self.dtype

    @property
    def row_elements(self) -> int:
        """Elements of a row, in `row_dtype`."""
        return self.page_size * (self.key_dim + self.value_dim)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.row_elements * self.row_dtype.itemsize

    @property
    def token_fields(self) -> tuple[tuple[int, int], ...]:
        """(start in the row, elements per token) of each field: keys and values, for int8 also their scales."""
        return (0, self.key_dim), (self.page_size * self.key_dim, self.value_dim)

    def encode(self, keys: Tensor, values: Tensor) -> list[Tensor]:
        """Encode keys [..., Dk] and values [..., Dv] to the stored fields, each [..., width]."""
        return [keys.to(self.dtype), values.to(self.dtype)]

    def decode(self, fields: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Decode fields to keys [..., Dk] and values [..., Dv] in the model's dtype."""
        keys, values = fields
        return keys, values

    def split(self, rows: Tensor) -> list[Tensor]:
        """Views [..., P, width] of the fields in rows [..., row_elements]."""
        return list(split_pages(rows, self.page_size, self.key_dim))

    def join(self, fields: Sequence[Tensor]) -> Tensor:
        """Rows [..., row_elements] from fields [..., P, width]; inverse of `split`."""
        return torch.cat([field.flatten(-2) for field in fields], -1)

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Decode rows to keys [..., P, Dk] and values [..., P, Dv]."""
        return self.decode(self.split(rows))


class Int8Layout(PageLayout):
    """Pages as int8: half the bytes of 16-bit pages. The error per element is at most scale / 2, plus rounding to the dtype."""

    @property
    def row_dtype(self) -> torch.dtype:
        return torch.int8

    @property
    def row_elements(self) -> int:
        used = super().row_elements + SCALES_BYTES * self.page_size
        return -(-used // _ALIGNED_BYTES) * _ALIGNED_BYTES

    @property
    def token_fields(self) -> tuple[tuple[int, int], ...]:
        each = SCALES_BYTES // 2
        return *super().token_fields, *((self.row_elements - number * each * self.page_size, each) for number in (2, 1))

    def encode(self, keys: Tensor, values: Tensor) -> list[Tensor]:
        """Encode to int8 keys and values, and their scales [..., 1], float32, > 0. A non-finite vector stays non-finite."""
        (key_codes, key_scale), (value_codes, value_scale) = quantize(keys.float()), quantize(values.float())
        return [key_codes, value_codes, key_scale.unsqueeze(-1), value_scale.unsqueeze(-1)]

    def decode(self, fields: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        keys, values, key_scale, value_scale = fields
        return (keys.float() * key_scale).to(self.dtype), (values.float() * value_scale).to(self.dtype)

    def split(self, rows: Tensor) -> list[Tensor]:
        size = self.page_size
        numbers = rows[..., : super().row_elements]
        scales = rows.view(torch.float32)[..., -2 * size :]
        return [*super().split(numbers), *(field.unsqueeze(-1) for field in scales.split(size, -1))]

    def join(self, fields: Sequence[Tensor]) -> Tensor:
        rows = fields[0].new_zeros((*fields[0].shape[:-2], self.row_elements))
        for place, field in zip(self.split(rows), fields, strict=True):
            place.copy_(field)
        return rows


def page_layouts(
    page_size: int, key_dim: int, value_dim: int, dtype: torch.dtype, int8: bool
) -> tuple[PageLayout, PageLayout]:
    """Layouts of pages in the compute tier and in the cpu tier; `int8` selects int8 in the cpu tier."""
    shape = page_size, key_dim, value_dim, dtype
    return PageLayout(*shape), Int8Layout(*shape) if int8 else PageLayout(*shape)
