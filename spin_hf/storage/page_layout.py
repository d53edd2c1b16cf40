"""In which form the tokens of a page lie in its row: as they came, or as int8 with a scale for each key and each value.

    PageLayout    [ P * Dk keys | P * Dv values ]                                            of the model's dtype
    Int8Layout    [ P * Dk keys | P * Dv values | unused | P key scales | P value scales ]     int8, scales float32
                number ~ whole number * scale;  scale = largest absolute number of the vector / 127;  rows of 16 n bytes

A scale belongs to one vector of one token, so tokens are appended to a page without touching those that are there, and trade
places as bytes. float32 covers what a model's dtype may hold, and costs 8 bytes a token: 3 % of 256 int8 numbers.

What is read is always decoded: of the model's dtype, the same whoever decodes it. The Triton kernels have both directions in
`common.py`, equal to the bit for finite numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.reference import split_pages

SCALES_BYTES = 8
"""Of a token: two float32."""
_ALIGNED_BYTES = 16


@dataclass(frozen=True)
class PageLayout:
    """Pages as they are.

    Attributes:
        page_size: tokens of a page, P.
        key_dim, value_dim: elements of a key and of a value, Dk and Dv.
        dtype: of the keys and values.
    """

    page_size: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype

    @property
    def row_dtype(self) -> torch.dtype:
        """Of a row."""
        return self.dtype

    @property
    def row_elements(self) -> int:
        """Of a row, in its dtype."""
        return self.page_size * (self.key_dim + self.value_dim)

    @property
    def row_bytes(self) -> int:
        """Of a row."""
        return self.row_elements * self.row_dtype.itemsize

    @property
    def token_parts(self) -> tuple[tuple[int, int], ...]:
        """Where in a row each part of the tokens begins, and how many elements of it a token has."""
        return (0, self.key_dim), (self.page_size * self.key_dim, self.value_dim)

    def encode(self, keys: Tensor, values: Tensor) -> list[Tensor]:
        """The parts of tokens: keys [..., Dk] and values [..., Dv] as they are kept, each [..., width]."""
        return [keys.to(self.dtype), values.to(self.dtype)]

    def decode(self, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Keys [..., Dk] and values [..., Dv], of the model's dtype, from the parts of tokens."""
        keys, values = parts
        return keys, values

    def split(self, rows: Tensor) -> list[Tensor]:
        """Views [..., P, width] of the parts of the tokens in rows [..., row_elements]."""
        return list(split_pages(rows, self.page_size, self.key_dim))

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Rows from parts, as `split` gives them."""
        return torch.cat([part.flatten(-2) for part in parts], -1)

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [..., P, Dk] and values [..., P, Dv] of rows."""
        return self.decode(self.split(rows))


class Int8Layout(PageLayout):
    """Pages in half of 16 bits. What a vector loses is half a scale at most in each number, and the rounding to its dtype."""

    @property
    def row_dtype(self) -> torch.dtype:
        return torch.int8

    @property
    def row_elements(self) -> int:
        used = super().row_elements + SCALES_BYTES * self.page_size
        return -(-used // _ALIGNED_BYTES) * _ALIGNED_BYTES

    @property
    def token_parts(self) -> tuple[tuple[int, int], ...]:
        each = SCALES_BYTES // 2
        return *super().token_parts, *((self.row_elements - number * each * self.page_size, each) for number in (2, 1))

    def encode(self, keys: Tensor, values: Tensor) -> list[Tensor]:
        """int8 keys and values, and their scales [..., 1], float32, > 0. A vector that is not finite stays not finite."""
        (key_codes, key_scale), (value_codes, value_scale) = _encode(keys), _encode(values)
        return [key_codes, value_codes, key_scale, value_scale]

    def decode(self, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        keys, values, key_scale, value_scale = parts
        return (keys.float() * key_scale).to(self.dtype), (values.float() * value_scale).to(self.dtype)

    def split(self, rows: Tensor) -> list[Tensor]:
        size = self.page_size
        numbers = rows[..., : super().row_elements]
        scales = rows.view(torch.float32)[..., -2 * size :]
        return [*super().split(numbers), *(part.unsqueeze(-1) for part in scales.split(size, -1))]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        rows = parts[0].new_zeros((*parts[0].shape[:-2], self.row_elements))
        for place, part in zip(self.split(rows), parts, strict=True):
            place.copy_(part)
        return rows


def page_layouts(
    page_size: int, key_dim: int, value_dim: int, dtype: torch.dtype, int8: bool
) -> tuple[PageLayout, PageLayout]:
    """In which form pages lie in the compute tier, and in the cpu tier, where they may be int8."""
    shape = page_size, key_dim, value_dim, dtype
    return PageLayout(*shape), Int8Layout(*shape) if int8 else PageLayout(*shape)


def _encode(vectors: Tensor) -> tuple[Tensor, Tensor]:
    exact = vectors.float()
    scale = exact.abs().amax(-1, keepdim=True) * (1 / 127)  # no division, which GPUs may do by another rounding
    scale = torch.where(scale == 0, 1.0, scale)  # too small a vector is one of zeros
    return torch.round(exact / scale).to(torch.int8), scale
