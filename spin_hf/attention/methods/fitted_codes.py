"""Vectors in two bits per number on average, in a basis that is fitted to a prompt: keys of tokens, and mean values of pages.

    vector [D]  --minus origin, times the basis-->  [D], largest variance first
                --minus the mean of its unit (keys only)-->  quarters in 4, 2, 2 and 0 bits, one scale  -->  [D / 4] uint8

A unit is 16 tokens of 4 consecutive pages. Its keys share one mean, int8.

Basis of keys. What counts is the error of dot products with queries. With C the second moment of the observation queries and S
the covariance of the keys about the means of their units, the basis is `L @ B`: L is the Cholesky factor of C, and B holds the
eigenvectors of L' S L. Errors of equal size in any two coordinates then change logits equally, and the first quarter of the
coordinates has most of the variance. C is averaged with its diagonal, in which both coordinates of a rotary pair get their
mean, as positions rotate later queries differently. Queries are transformed by the inverse:
q . k = (q @ inverse) . (k @ forward).

Basis of values. Eigenvectors of the covariance of the pages' mean values.

B comes from `ITERATIONS` steps of subspace iteration. Only the quarters need to be separated, not single eigenvectors. Inside a
quarter the Hadamard rotation of `four_bit_keys` makes the numbers alike, so that one width serves the quarter.

Levels are odd multiples of half a width, times the scale of the vector: 16 levels in the first quarter, 4 in the second and
third. The scale is the least-squares one of the best of five first guesses.

Bytes of a unit for D = 64: mean 64 + 2, codes 256, scales 32, values 4 * (16 + 2): 426, 10.4 % of keys and values in 16 bits.
For D = 128: 128 + 2, 512, 32, 4 * (32 + 2): 810, 9.9 %.

There are E coordinates, the next multiple of 16 from D on. Those beyond D are zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ... import kernels
from . import four_bit_keys

UNIT_TOKENS = 16
"""Tokens that share a mean key."""
ITERATIONS = 8
"""Steps of subspace iteration."""
_SMOOTHING = 0.3
"""Weight of the diagonal in the second moment of queries."""
_STEPS = (0.335, 0.996, 0.996, 0.0)
"""Widths of levels of each quarter, in standard deviations: those of least squared error for 4 and 2 bits; 0 for no bits."""
_FLOOR = 1e-4
"""Part of the mean variance that is added to the variance of each quarter. Some quarters of short prompts have none."""
_GUESSES = (0.75, 0.87, 1.0, 1.15, 1.35)


@dataclass(frozen=True)
class Basis:
    """Coordinates of vectors of each KV head, [..., D] for any leading dimensions, float32. Encoding takes any matrices.

    Attributes:
        origin: [..., D]: subtracted first. Its dot product with the query is added to logits.
        forward: [..., D, E]: coordinates are (vector - origin) @ forward.
        inverse: [..., D, E]: queries are transformed by q @ inverse, for keys; vectors are coordinates @ inverse.mT + origin.
        widths: [..., E]: distance of two levels at scale 1; 0 in the last quarter.
    """

    origin: Tensor
    forward: Tensor
    inverse: Tensor
    widths: Tensor

    def coordinates(self, vectors: Tensor) -> Tensor:
        """Coordinates [..., n, E] of vectors [..., n, D].

        Products are summed in 64 bits, so that a vector gets the same coordinates whatever else is in the call.
        """
        return ((vectors.float() - self.origin.unsqueeze(-2)).double() @ self.forward.double()).float()

    def vectors(self, coordinates: Tensor) -> Tensor:
        """Vectors [..., n, D] of coordinates [..., n, E]."""
        return coordinates @ self.inverse.mT + self.origin.unsqueeze(-2)


def num_coordinates(dim: int) -> int:
    """Coordinates of a vector of `dim` numbers: the next multiple of 16."""
    return -(-dim // 16) * 16


def fixed_basis(dim: int, device: torch.device) -> Basis:
    """A basis that depends on the head size alone: the rotation of `four_bit_keys`, all variances alike."""
    axes = four_bit_keys.rotate(torch.eye(dim, device=device))
    return Basis(torch.zeros(dim, device=device), *_with_quarters(axes, axes, torch.ones(dim, device=device)))


def fit_keys(keys: Tensor, observation_queries: Tensor | None) -> Basis:
    """The basis of keys; see `measure_keys` and `key_basis`."""
    return key_basis(*measure_keys(keys, observation_queries))


def measure_keys(keys: Tensor, observation_queries: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """What the basis of keys depends on.

    Args:
        keys: [..., n, D], in the order of their pages; n is a multiple of `UNIT_TOKENS`.
        observation_queries: [..., m, D] of all query heads of the KV head, times the scale of attention scores. None if there
            are none: all directions of a query then count alike.
    Returns:
        mean [..., D], covariance of keys about the means of their units, and second moment of queries, both [..., D, D].
    """
    keys, dim = keys.float(), keys.shape[-1]
    units = keys.unflatten(-2, (-1, UNIT_TOKENS))
    inside = (units - units.mean(-2, keepdim=True)).flatten(-3, -2)
    covariance = inside.mT @ inside / keys.shape[-2]
    if observation_queries is None:
        moment = torch.eye(dim, device=keys.device).expand_as(covariance)
    else:
        moment = _moment(observation_queries.float())
    return keys.mean(-2), covariance, moment


def key_basis(mean: Tensor, covariance: Tensor, moment: Tensor) -> Basis:
    """The basis of keys, from what `measure_keys` returns."""
    root = torch.linalg.cholesky_ex(moment).L  # waits for no device, and does not raise
    axes, variances = _main_axes(root.mT @ covariance @ root)
    inverse = torch.linalg.solve_triangular(root.mT, axes, upper=True)
    return Basis(mean, *_with_quarters(root @ axes, inverse, variances))


def _moment(queries: Tensor) -> Tensor:
    """Smoothed second moment [..., D, D] of queries [..., m, D]. It is positive definite.

    Its size does not matter, so the mean of the diagonal is 1, which keeps both matrices of the basis in the range of float16.
    """
    dim = queries.shape[-1]
    moment = queries.mT @ queries
    moment = moment / moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp(min=1e-30)
    pairs = moment.diagonal(dim1=-2, dim2=-1)
    if dim % 2 == 0:  # both coordinates of a rotary pair get their mean
        halves = pairs.unflatten(-1, (2, dim // 2)).mean(-2)
        pairs = torch.cat([halves, halves], -1)
    pairs = pairs + 0.01 * pairs.mean(-1, keepdim=True) + 1e-12
    return (1 - _SMOOTHING) * moment + _SMOOTHING * torch.diag_embed(pairs)


def fit_values(means: Tensor) -> Basis:
    """The basis of mean values of pages [..., n, Dv]."""
    return value_basis(*measure_values(means))


def measure_values(means: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [..., Dv] and covariance [..., Dv, Dv] of the mean values of pages [..., n, Dv]."""
    means = means.float()
    origin = means.mean(-2)
    inside = means - origin.unsqueeze(-2)
    return origin, inside.mT @ inside / means.shape[-2]


def value_basis(mean: Tensor, covariance: Tensor) -> Basis:
    """The basis of mean values, from what `measure_values` returns."""
    axes, variances = _main_axes(covariance)
    return Basis(mean, *_with_quarters(axes, axes, variances))


def encode_pages(
    keys: Tensor, values: Tensor, valid: Tensor, key_basis: Basis, value_basis: Basis
) -> dict[str, Tensor]:  # fmt: skip
    """Encode pages by units of `UNIT_TOKENS`; the last unit may have fewer pages.

    Args:
        keys, values: [S, H, n, P, D] and [S, H, n, P, Dv].
        valid: [S, 1, n, P], bool: False for tokens that do not count.
        key_basis, value_basis: of each sequence and KV head.
    Returns:
        The summaries of `Fitted.summary_shapes`.
    """
    launch = kernels.launchers(keys.device)
    if launch is not None and keys.shape[-1] % 16 == 0 and values.shape[-1] % 16 == 0:
        bases = [(basis.origin, basis.forward, basis.widths) for basis in (key_basis, value_basis)]
        made = launch.encode_units(keys, values, valid, *bases)
        if made is not None:
            return made
    return encode_by_formulas(keys, values, valid, key_basis, value_basis)


def encode_by_formulas(
    keys: Tensor, values: Tensor, valid: Tensor, key_basis: Basis, value_basis: Basis
) -> dict[str, Tensor]:  # fmt: skip
    """`encode_pages` in PyTorch: the specification."""
    count, page = keys.shape[2:4]
    short = -count % (UNIT_TOKENS // page)
    held, there = (
        torch.nn.functional.pad(keys, (0, 0, 0, 0, 0, short)),
        torch.nn.functional.pad(valid, (0, 0, 0, short)),
    )
    shape = (-1, UNIT_TOKENS)
    mean, unit, codes, scale = encode_keys(
        held.flatten(2, 3).unflatten(2, shape), key_basis, there.flatten(2, 3).unflatten(2, shape)
    )
    codes, scale = (part.flatten(2, 3).unflatten(2, (-1, page))[:, :, :count] for part in (codes, scale))
    value, value_scale = encode_values(kernels.page_means(values, valid), value_basis)
    return {
        "mean": mean * unit.unsqueeze(-1), "codes": codes, "scale": scale, "value": value, "value_scale": value_scale,
    }  # fmt: skip


def encode_keys(keys: Tensor, basis: Basis, valid: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Encode the keys of units.

    Args:
        keys: [..., n, 16, D].
        valid: [..., n, 16], bool, broadcastable: False for tokens that do not count; None for all.
    Returns:
        mean [..., n, E], int8; unit [..., n], float32; codes [..., n, 16, E / 4], uint8; scale [..., n, 16], float32, -1 for
        tokens that are not valid.
    """
    inside = basis.coordinates(keys.flatten(-3, -2)).unflatten(-2, keys.shape[-3:-1])
    if valid is None:
        valid = torch.ones((1,) * (keys.dim() - 2) + (keys.shape[-2],), dtype=torch.bool, device=keys.device)
    inside = inside.masked_fill(~valid.unsqueeze(-1), 0.0)
    middle = inside.sum(-2) / valid.sum(-1, keepdim=True).clamp(min=1)
    mean, unit = kernels.quantize(middle)
    inside = inside - (mean * unit.unsqueeze(-1)).unsqueeze(-2)
    codes, scale = encode(inside, basis.widths[..., None, None, :])
    return mean, unit, codes, scale.masked_fill(~valid, -1.0)


def key_logits(queries: Tensor, basis: Basis, mean: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Dot products of queries with encoded keys.

    Args:
        queries: [..., G, D], times the scale of attention scores.
        mean: [..., n, E], decoded means of the units or of the pages' units.
        codes, scale: [..., n, P, E / 4] and [..., n, P], of the P tokens that have this mean, as `encode_keys` returns them.
    Returns:
        [..., G, n, P], float32; -inf for tokens that are not valid.
    """
    states = queries.float() @ basis.inverse
    middle = states @ mean.float().mT + queries.float() @ basis.origin.unsqueeze(-1)
    levels = decode(codes, states.shape[-1])
    inside = (states * basis.widths.unsqueeze(-2)) @ levels.flatten(-3, -2).mT
    logits = middle.unsqueeze(-1) + inside.unflatten(-1, levels.shape[-3:-1]) * scale.float().unsqueeze(-3)
    return logits.masked_fill((scale < 0).unsqueeze(-3), float("-inf"))


def encode_values(means: Tensor, basis: Basis) -> tuple[Tensor, Tensor]:
    """Encode mean values of pages [..., n, Dv]: codes [..., n, E / 4], uint8, and scale [..., n], float32."""
    return encode(basis.coordinates(means), basis.widths.unsqueeze(-2))


def decode_values(basis: Basis, codes: Tensor, scale: Tensor) -> Tensor:
    """Mean values [..., n, Dv], float32, as `encode_values` returned them."""
    levels = decode(codes, basis.widths.shape[-1])
    return basis.vectors(levels * basis.widths.unsqueeze(-2) * scale.float().unsqueeze(-1))


def weighted_values(weights: Tensor, basis: Basis, codes: Tensor, scale: Tensor) -> Tensor:
    """Sums of encoded values with weights [..., G, n]: [..., G, Dv], float32. The basis is undone once, after the sum."""
    levels = decode(codes, basis.widths.shape[-1])
    inside = (weights * scale.unsqueeze(-2)) @ levels * basis.widths.unsqueeze(-2)
    return inside @ basis.inverse.mT + weights.sum(-1, keepdim=True) * basis.origin.unsqueeze(-2)


def encode(inside: Tensor, widths: Tensor) -> tuple[Tensor, Tensor]:
    """Encode coordinates.

    Args:
        inside: [..., E], float32; widths: as `Basis.widths`, broadcastable.
    Returns:
        codes: [..., E / 4], uint8: two numbers in each of the first E / 8 bytes, four in each of the others.
        scale: [...], float32, > 0 and exact in bfloat16. A coordinate is about level * width * scale.
    """
    dim = inside.shape[-1]
    quarter = dim // 4
    used, widths = inside[..., : 3 * quarter], widths[..., : 3 * quarter].expand_as(inside[..., : 3 * quarter])
    top = _by_quarter((15.0, 3.0, 3.0), quarter, inside.device)
    steps = _by_quarter(_STEPS[:3], quarter, inside.device)
    size = (used * steps / widths).square().mean(-1, keepdim=True).sqrt().clamp(min=1e-20)
    best = scale = lowest = torch.empty(0)
    for index, guess in enumerate(_GUESSES):
        codes = (used / (widths * (size * guess)) + top / 2).round().clamp(min=0).minimum(top)
        levels = (codes - top / 2) * widths
        fitted = (levels * used).sum(-1, keepdim=True) / levels.square().sum(-1, keepdim=True)
        fitted = fitted.clamp(min=1e-20).to(torch.bfloat16).float()
        error = (levels * fitted - used).square().sum(-1, keepdim=True)
        if not index:
            best, scale, lowest = codes, fitted, error
            continue
        better = error < lowest
        best, scale, lowest = best.where(~better, codes), scale.where(~better, fitted), lowest.minimum(error)
    fine, rough = best.to(torch.uint8).split([quarter, 2 * quarter], -1)
    return torch.cat([_packed(fine, 2), _packed(rough, 4)], -1), scale.squeeze(-1)


def decode(codes: Tensor, dim: int) -> Tensor:
    """Levels [..., E], float32, of codes [..., E / 4]; 0 in the last quarter. `dim` is E."""
    fine, rough = codes.split([dim // 8, dim // 8], -1)
    levels = torch.cat([_unpacked(fine, 2).float() - 7.5, _unpacked(rough, 4).float() - 1.5], -1)
    return torch.nn.functional.pad(levels, (0, dim // 4))


def _packed(codes: Tensor, per_byte: int) -> Tensor:
    """Several codes per byte, the first in the lowest bits."""
    bits = 8 // per_byte
    parts = codes.unflatten(-1, (-1, per_byte)).unbind(-1)
    whole = torch.zeros_like(parts[0])
    for index, part in enumerate(parts):
        whole = whole | (part << (bits * index))
    return whole


def _unpacked(codes: Tensor, per_byte: int) -> Tensor:
    bits = 8 // per_byte
    return torch.stack([(codes >> (bits * index)) & ((1 << bits) - 1) for index in range(per_byte)], -1).flatten(-2)


def _main_axes(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Approximate eigenvectors of symmetric matrices [..., D, D], largest first, and the variances along them [..., D]."""
    dim = matrix.shape[-1]
    size = matrix.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=1e-20)[..., None, None]
    eye = torch.eye(dim, device=matrix.device)
    matrix = matrix / size + 1e-7 * eye
    axes = eye.expand_as(matrix)
    for _ in range(ITERATIONS):
        axes = _orthonormal(matrix @ axes)
    variances = (axes * (matrix @ axes)).sum(-2)
    order = variances.argsort(-1, descending=True)
    axes = axes.gather(-1, order.unsqueeze(-2).expand_as(axes))
    return axes, variances.gather(-1, order) * size.squeeze(-1)


def _orthonormal(columns: Tensor) -> Tensor:
    """Q of the QR decomposition of [..., D, D], by Cholesky decompositions of its Gram matrix in 64 bits, twice.

    By reflections a GPU decomposes one matrix after the other, by Cholesky all of them at once: 256 matrices would take most of
    a second. The first ridge keeps nearly dependent columns from failing. The second time removes what it leaves.
    """
    columns, eye = columns.double(), torch.eye(columns.shape[-1], dtype=torch.float64, device=columns.device)
    for ridge in (1e-12, 0.0):
        gram = columns.mT @ columns
        gram = gram + ridge * gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None] * eye
        root = torch.linalg.cholesky_ex(gram).L.mT
        columns = torch.linalg.solve_triangular(root, columns, upper=True, left=False)
    return columns.float()


def _with_quarters(forward: Tensor, inverse: Tensor, variances: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Append coordinates that are zero, and rotate inside quarters: the new matrices, and the widths of levels."""
    more = num_coordinates(variances.shape[-1]) - variances.shape[-1]
    padded = [torch.nn.functional.pad(matrix, (0, more)) for matrix in (forward, inverse, variances)]
    quarter = padded[2].shape[-1] // 4
    spread = padded[2].unflatten(-1, (4, quarter)).mean(-1)
    spread = (spread + _FLOOR * spread.mean(-1, keepdim=True)).clamp(min=1e-20).sqrt()
    widths = (spread * torch.tensor(_STEPS, device=spread.device)).repeat_interleave(quarter, -1)
    block = quarter & -quarter  # of the rotation; each block gets large and small variances
    mixed = [part.unflatten(-1, (4, block, -1)).transpose(-1, -2).flatten(-2) for part in padded[:2]]
    turned = [four_bit_keys.rotate(part).flatten(-2) for part in mixed]
    return turned[0], turned[1], widths


def _by_quarter(numbers: tuple[float, ...], quarter: int, device: torch.device) -> Tensor:
    return torch.tensor(numbers, device=device).repeat_interleave(quarter)


def bytes_per_token(head_dim: int, value_dim: int, page_size: int = 4) -> float:
    """Bytes of summaries of a token and KV head."""
    key, value = num_coordinates(head_dim), num_coordinates(value_dim)
    return (key + 2) / UNIT_TOKENS + key / 4 + 2 + (value / 4 + 2) / page_size


__all__ = [
    "Basis", "bytes_per_token", "decode", "decode_values", "encode", "encode_by_formulas", "encode_keys", "encode_pages",
    "encode_values", "fit_keys", "fit_values", "fixed_basis", "key_basis", "key_logits", "measure_keys", "measure_values",
    "num_coordinates", "value_basis", "weighted_values",
]  # fmt: skip
