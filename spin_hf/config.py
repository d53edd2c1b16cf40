"""Options of a cache: parsing, validation and messages.

`SpinOptions` is what is left after validation: frozen, in plain units (tokens, bytes), the same for every layer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from .errors import BudgetError, OptionError, OptionTypeError

_BYTE_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_BYTE_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}

SUMMARY_DTYPES = ("auto", "int8", "model")
CPU_DTYPES = ("auto", "int8")


def parse_bytes(name: str, value: int | str) -> int | None:
    """Bytes of a memory cap.

    Args:
        name: the option's name, for messages.
        value: a number of bytes, a text such as `"8GiB"` or `"500 MB"`, or `"auto"`.
    Returns:
        The cap in bytes; None for `"auto"`.
    Raises:
        OptionTypeError, OptionError: not a size, or not positive.
    """
    remedy = f'pass {name}="8GiB", a number of bytes, or "auto"'
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise OptionTypeError(f"{name}: expected an int or a text, got {type(value).__name__}; {remedy}")
    if isinstance(value, str):
        if value.strip().lower() == "auto":
            return None
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
        unit = _BYTE_UNITS.get(match[2].lower() or "b") if match else None
        if match is None or unit is None:
            raise OptionError(
                f"{name}: expected a size such as '8GiB' (units {', '.join(_BYTE_UNITS)}), got {value!r}; {remedy}"
            )
        value = int(float(match[1]) * unit)
    if value <= 0:
        raise OptionError(f"{name}: expected more than 0 bytes, got {value}; {remedy}")
    return value


def require_count(name: str, value: Any, minimum: int) -> int:
    """`value` as an int of at least `minimum`; raises OptionTypeError or OptionError that name the option."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise OptionTypeError(f"{name}: expected an int, got {type(value).__name__}; pass {name}={minimum} or more")
    if value < minimum:
        raise OptionError(f"{name}: expected at least {minimum}, got {value}; pass {name}={minimum} or more")
    return value


def require_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise OptionTypeError or OptionError, naming the option, unless `value` is one of `choices`."""
    message = f'{name}: expected one of {", ".join(map(repr, choices))}, got {value!r}; pass {name}="{choices[0]}"'
    if not isinstance(value, str):
        raise OptionTypeError(message)
    if value not in choices:
        raise OptionError(message)


@dataclass(frozen=True)
class SpinOptions:
    """What a user may choose, beside the method.

    Attributes:
        budget: tokens that a method selects per KV head and step, beside sinks and recent window: an int, or a float
            share (0, 1] of the tokens that the sequence holds. Rounded up to whole pages.
        num_sink_tokens: the first tokens of each sequence (padding not counted) that are always attended, by whole
            pages.
        recent_window: the last tokens (padding not counted, the query's own included) that are always attended, by
            whole pages. At least 1: a token always attends to itself.
        dense_below: a query whose sequence holds at most this many tokens attends to all of them.
        gpu_memory: cap in bytes on what the cache holds in the compute tier; None for automatic.
        cpu_memory: cap in bytes on the cpu tier; None for no cap.
        summary_dtype: "int8", "model" for the dtype of the keys, or "auto": int8 where keys have 16 bits.
        cpu_dtype: of pages in the cpu tier: "auto" for the dtype of the keys, or "int8".
    """

    budget: int | float = 2048
    num_sink_tokens: int = 4
    recent_window: int = 64
    dense_below: int = 0
    gpu_memory: int | None = None
    cpu_memory: int | None = None
    summary_dtype: str = "auto"
    cpu_dtype: str = "auto"

    @classmethod
    def parse(
        cls,
        *,
        budget: int | float = 2048,
        num_sink_tokens: int = 4,
        recent_window: int = 64,
        dense_below: int = 0,
        gpu_memory: int | str = "auto",
        cpu_memory: int | str = "auto",
        summary_dtype: str = "auto",
        cpu_dtype: str = "auto",
    ) -> SpinOptions:
        """Validate what the user wrote.

        Raises:
            OptionTypeError, OptionError, BudgetError: with expected, actual and remedy; nothing has been allocated.
        """
        require_count("num_sink_tokens", num_sink_tokens, 0)
        require_count("recent_window", recent_window, 1)
        require_count("dense_below", dense_below, 0)
        if isinstance(budget, bool) or not isinstance(budget, (int, float)):
            raise OptionTypeError(
                f"budget: expected an int (tokens) or a float (share of the context), got {type(budget).__name__}; "
                "pass budget=2048 or budget=0.02"
            )
        if isinstance(budget, float) and not 0.0 < budget <= 1.0:
            raise OptionError(
                f"budget: a float is a share of the context in (0, 1], got {budget}; pass an int for a number of tokens"
            )
        if isinstance(budget, int) and budget < max(1, num_sink_tokens):
            raise BudgetError(
                f"budget={budget} is below num_sink_tokens={num_sink_tokens} (and must be at least 1); "
                "raise budget or lower num_sink_tokens"
            )
        require_choice("summary_dtype", summary_dtype, SUMMARY_DTYPES)
        require_choice("cpu_dtype", cpu_dtype, CPU_DTYPES)
        return cls(
            budget=budget,
            num_sink_tokens=num_sink_tokens,
            recent_window=recent_window,
            dense_below=dense_below,
            gpu_memory=parse_bytes("gpu_memory", gpu_memory),
            cpu_memory=parse_bytes("cpu_memory", cpu_memory),
            summary_dtype=summary_dtype,
            cpu_dtype=cpu_dtype,
        )

    @property
    def host_int8(self) -> bool:
        """Whether pages in the cpu tier are int8."""
        return self.cpu_dtype == "int8"

    def quantizes(self, item_bytes: int) -> bool:
        """Whether vectors of summaries are int8 where keys have items of so many bytes."""
        return self.summary_dtype == "int8" or (self.summary_dtype == "auto" and item_bytes == 2)
