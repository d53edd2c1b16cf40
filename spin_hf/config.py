"""Options of a cache: parsing, validation and messages.

    SpinOptions    what the user chooses
     └── Tuning    sizes and intervals that only tests and benchmarks change

`SpinOptions` holds the validated options: frozen, in tokens and bytes, the same for every layer. Numbers of any type (numpy
too) become plain ints and floats. Unbounded numbers are clamped to `MOST_TOKENS` or `MOST_BYTES`, so that later arithmetic
does not overflow 32 or 64 bits.
"""

from __future__ import annotations

import math
import numbers
import re
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from .errors import BudgetError, OptionError, OptionTypeError

_BYTE_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_BYTE_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}

MOST_TOKENS = 1 << 30
"""Larger numbers of tokens are clamped to this: no context is longer, and kernels add token counts in int32."""
MOST_BYTES = 1 << 60
"""Larger numbers of bytes are clamped to this."""

LEAST_RECTIFY, MOST_RECTIFY = 64, 1024
"""Limits of `rectify_interval`. Fewer tokens are decoded, not read; later ones would have been clustered before."""

SUMMARY_DTYPES = ("auto", "int8", "model")
CPU_DTYPES = ("auto", "int8")
PREFILLS = ("dense", "sparse")


def parse_bytes(name: str, value: int | str) -> int | None:
    """Parse a memory cap.

    Args:
        name: the option's name, for messages.
        value: a number of bytes, a string such as `"8GiB"` or `"500 MB"`, or `"auto"`.
    Returns:
        The cap in bytes; None for `"auto"`.
    Raises:
        OptionTypeError, OptionError: `value` is not a size or not positive.
    """
    remedy = f'pass {name}="8GiB", a number of bytes, or "auto"'
    if isinstance(value, bool) or not isinstance(value, (numbers.Integral, str)):
        raise OptionTypeError(f"{name}: expected an int or a text, got {type(value).__name__}; {remedy}")
    if isinstance(value, str):
        if value.strip().lower() == "auto":
            return None
        match = re.fullmatch(r"\s*(\d{1,40}(?:\.\d{1,40})?)\s*([A-Za-z]*)\s*", value, re.ASCII)
        unit = _BYTE_UNITS.get(match[2].lower() or "b") if match else None
        if match is None or unit is None:
            raise OptionError(
                f"{name}: expected a size such as '8GiB' (units {', '.join(_BYTE_UNITS)}), got {shown(value)}; {remedy}"
            )
        value = int(Fraction(match[1]) * unit)
    if value <= 0:
        raise OptionError(f"{name}: expected more than 0 bytes, got {shown(value)}; {remedy}")
    return min(int(value), MOST_BYTES)


def require_count(
    name: str, value: Any, minimum: int, maximum: int | None = None, *, example: int | None = None
) -> int:
    """`value` as an int from `minimum` to `maximum`; raises OptionTypeError or OptionError, naming the option.

    Args:
        maximum: largest valid value; None for no limit.
        example: the value that the message suggests; None for `minimum`.
    """
    remedy = f"pass {name}={minimum} or more" if example is None else f"pass {name}={example}"
    count = _require_int(name, value, remedy)
    if count < minimum:
        raise OptionError(f"{name}: expected at least {minimum}, got {shown(count)}; {remedy}")
    if maximum is not None and count > maximum:
        raise OptionError(f"{name}: expected at most {maximum}, got {shown(count)}; {remedy}")
    return count


def _require_int(name: str, value: Any, remedy: str) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise OptionTypeError(f"{name}: expected an int, got {type(value).__name__}; {remedy}")
    return int(value)


def require_tokens(name: str, value: Any, minimum: int) -> int:
    """As `require_count`, clamped to `MOST_TOKENS`."""
    return min(require_count(name, value, minimum), MOST_TOKENS)


def require_one_of(name: str, value: Any, choices: tuple[int, ...], *, example: int) -> int:
    """`value` as an int that is one of `choices`; raises OptionTypeError or OptionError, naming the option."""
    remedy = f"pass {name}={example}"
    count = _require_int(name, value, remedy)
    if count not in choices:
        raise OptionError(f"{name}: expected one of {choices}, got {shown(value)}; {remedy}")
    return count


def require_real(name: str, value: Any, example: float) -> float:
    """`value` as a float, infinite if it overflows; raises OptionTypeError, naming the option and `example`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise OptionTypeError(f"{name}: expected a float, got {type(value).__name__}; pass {name}={example}")
    given: Any = value
    try:
        return float(given)
    except OverflowError:
        return math.inf if int(given) > 0 else -math.inf


def require_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise OptionTypeError or OptionError, naming the option, unless `value` is one of `choices`."""
    message = f'{name}: expected one of {", ".join(map(repr, choices))}, got {shown(value)}; pass {name}="{choices[0]}"'
    if not isinstance(value, str):
        raise OptionTypeError(message)
    if value not in choices:
        raise OptionError(message)


def shown(value: Any, most: int = 300) -> str:
    """`value` as text for a message: truncated if long; its type if `repr` fails, as for very long ints."""
    try:
        text = repr(value)
    except Exception:
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= most else f"{text[:most]}..."


INDEX_COPIES = 4
"""Temporary memory of clustering and summarizing pages, in bytes for each byte of theirs: the pages, the pages in their new
order, and points to cluster with their attention weights take 3.2."""


@dataclass(frozen=True)
class Tuning:
    """Sizes and intervals of one cache, for tests and benchmarks. Not part of the interface.

    Small numbers let a small cache do what a large one does: it then has several chunks, splits, spans and checks.

    Attributes:
        programs: target number of programs of a kernel launch: four per multiprocessor of an H100.
        min_chunk_segments, max_chunk_segments: limits on the segments of a chunk.
        cpu_chunk_bytes, gpu_chunk_bytes: size of a chunk. Host memory is committed on first write, so its chunks may be large.
            GPU memory and page-locked memory are committed at once.
        index_bytes: most bytes of pages that are clustered or summarized in one call, unless one layer has more. Bounds
            temporary memory, with `index_room`.
        cluster_tokens: most tokens clustered at a time, per sequence and per call of the method. Bounds temporary memory.
        slack_tokens: tokens before the recent window that are not clustered yet, so that assisted generation can crop rejected
            tokens cheaply.
        margin_bytes: smallest margin of free GPU memory, but at most a fifth of the pool (`memory/watermarks.py`).
        check_interval_steps: steps between two checks of free GPU memory, which query the driver.
        prompt_frames: most page frames per KV head during a prefill, which does not read them.
        prefill_tokens: most tokens of all sequences in a chunk of a prompt on a GPU: enough for matrix products at full speed.
        dense_factor: of `KernelRecipe.overhead_us`, for `dense_below="auto"`; 0 for sparse attention at any length.
        compiles_early: whether kernels of steps are compiled while the prompt is read.
        piece_bytes: keys and values that a prompt reads at a time from earlier pages (`storage/page_stream.py`).
    """

    programs: int = 528
    min_chunk_segments: int = 4
    max_chunk_segments: int = 1024
    cpu_chunk_bytes: int = 64 << 20
    gpu_chunk_bytes: int = 8 << 20
    index_bytes: int = 512 << 20
    cluster_tokens: int = 32768
    slack_tokens: int = 64
    margin_bytes: int = 256 << 20
    check_interval_steps: int = 64
    prompt_frames: int = 512
    prefill_tokens: int = 8192
    piece_bytes: int = 128 << 20
    dense_factor: float = 1.0
    compiles_early: bool = True

    def index_room(self, free: int | None) -> int:
        """`index_bytes`, or less if temporary memory of `INDEX_COPIES` times as much takes over half of `free` bytes.

        Args:
            free: free bytes of the compute tier; None if not known.
        """
        return self.index_bytes if free is None else max(1, min(self.index_bytes, free // (2 * INDEX_COPIES)))


@dataclass(frozen=True)
class SpinOptions:
    """Options of a cache other than its method. Numbers of tokens are at most `MOST_TOKENS`.

    Attributes:
        budget: tokens selected per KV head and step, in addition to sinks and recent window: an int, or a float fraction
            in (0, 1] of the sequence's tokens. Rounded up to whole pages.
        num_sink_tokens: first tokens of each sequence that are always attended to, without padding. Rounded up to whole
            pages.
        recent_window: last tokens that are always attended to, without padding and including the query's own token. At
            least 1. Rounded up to whole pages.
        dense_below: a query attends to all tokens if its sequence has at most this many. "auto": steps of one token do where
            that is faster, as reading all keys and values takes less than the method's `KernelRecipe.overhead_us`, while all
            pages are on the GPU.
        gpu_memory: cap in bytes on the compute tier (GPU memory, or RAM without a GPU); None for what is free, less a margin.
        cpu_memory: cap in bytes on the cpu tier (host memory); None for no cap.
        summary_dtype: "int8", "model" for the dtype of the keys, or "auto": int8 if keys have 16 bits.
        cpu_dtype: of pages in the cpu tier: "auto" for the dtype of the keys, or "int8".
        prefill_chunk_size: most tokens per sequence that a prompt's forward reads at a time; None for a size by device.
        prefill: "dense", or "sparse" for block-sparse attention of prompts (`backends/sparse_prompt.py`).
        prefill_top_p: share of attention, as estimated, that a block of queries of a sparse prompt reads, in (0, 1].
        rectify_interval: generated tokens after which they are computed again with attention to all tokens; None for never.
        tuning: no option of the user, see `Tuning`.
    """

    budget: int | float = 2048
    num_sink_tokens: int = 4
    recent_window: int = 64
    dense_below: int | str = "auto"
    gpu_memory: int | None = None
    cpu_memory: int | None = None
    summary_dtype: str = "auto"
    cpu_dtype: str = "auto"
    prefill_chunk_size: int | None = None
    prefill: str = "dense"
    prefill_top_p: float = 0.9
    rectify_interval: int | None = None
    tuning: Tuning = field(default=Tuning(), repr=False)

    @classmethod
    def parse(
        cls,
        *,
        budget: Any = 2048,
        num_sink_tokens: Any = 4,
        recent_window: Any = 64,
        dense_below: Any = "auto",
        gpu_memory: Any = "auto",
        cpu_memory: Any = "auto",
        summary_dtype: Any = "auto",
        cpu_dtype: Any = "auto",
        prefill_chunk_size: Any = "auto",
        prefill: Any = "dense",
        prefill_top_p: Any = 0.9,
        rectify_interval: Any = None,
    ) -> SpinOptions:
        """Validate the user's arguments.

        Raises:
            OptionTypeError, OptionError, BudgetError: with expected, actual and remedy. Nothing has been allocated.
        """
        sinks = require_count("num_sink_tokens", num_sink_tokens, 0)
        if isinstance(budget, bool) or not isinstance(budget, numbers.Real):
            raise OptionTypeError(
                f"budget: expected an int (tokens) or a float (fraction of the context), got {type(budget).__name__}; "
                "pass budget=2048 or budget=0.02"
            )
        if isinstance(budget, numbers.Integral):
            if int(budget) < max(1, sinks):
                raise BudgetError(
                    f"budget={shown(budget)} is below num_sink_tokens={shown(sinks)} (and must be at least 1); "
                    "raise budget or lower num_sink_tokens"
                )
            budget = require_tokens("budget", budget, 1)
        else:
            budget = require_real("budget", budget, 0.02)
            if not 0.0 < budget <= 1.0:
                raise OptionError(
                    f"budget: expected a float (fraction of the context) in (0, 1], got {budget}; pass an int for tokens"
                )
        require_choice("summary_dtype", summary_dtype, SUMMARY_DTYPES)
        require_choice("cpu_dtype", cpu_dtype, CPU_DTYPES)
        require_choice("prefill", prefill, PREFILLS)
        top_p = require_real("prefill_top_p", prefill_top_p, 0.9)
        if not 0.0 < top_p <= 1.0:
            raise OptionError(f"prefill_top_p: expected a share in (0, 1], got {top_p}; pass prefill_top_p=0.9")
        return cls(
            budget=budget, num_sink_tokens=min(sinks, MOST_TOKENS),
            recent_window=require_tokens("recent_window", recent_window, 1),
            dense_below=_dense_below(dense_below),
            gpu_memory=parse_bytes("gpu_memory", gpu_memory), cpu_memory=parse_bytes("cpu_memory", cpu_memory),
            summary_dtype=summary_dtype, cpu_dtype=cpu_dtype, prefill_chunk_size=_chunk_size(prefill_chunk_size),
            prefill=prefill, prefill_top_p=top_p, rectify_interval=_rectify_interval(rectify_interval),
        )  # fmt: skip

    @property
    def dense_tokens(self) -> int:
        """`dense_below` in tokens; 0 for "auto"."""
        return 0 if isinstance(self.dense_below, str) else self.dense_below

    @property
    def host_int8(self) -> bool:
        """Whether pages in the cpu tier are int8."""
        return self.cpu_dtype == "int8"

    def quantizes(self, item_bytes: int) -> bool:
        """Whether summaries are int8 for keys of `item_bytes` bytes per element."""
        return self.summary_dtype == "int8" or (self.summary_dtype == "auto" and item_bytes == 2)


def _dense_below(value: Any) -> int | str:
    if isinstance(value, str):
        if value == "auto":
            return value
        raise OptionError(f'dense_below: expected an int (tokens) or "auto", got {shown(value)}; pass dense_below=4096')
    return require_tokens("dense_below", value, 0)


def _rectify_interval(value: Any) -> int | None:
    if value is None:
        return None
    return require_count("rectify_interval", value, LEAST_RECTIFY, MOST_RECTIFY, example=MOST_RECTIFY)


def _chunk_size(value: Any) -> int | None:
    """`prefill_chunk_size` in tokens: None for "auto", `MOST_TOKENS` for None (whole prompts)."""
    if value is None:
        return MOST_TOKENS
    if isinstance(value, str) and value == "auto":
        return None
    if isinstance(value, str):
        raise OptionError(
            f'prefill_chunk_size: expected a number of tokens, "auto" or None, got {shown(value)}; pass prefill_chunk_size=2048'
        )
    return require_tokens("prefill_chunk_size", value, 1)
