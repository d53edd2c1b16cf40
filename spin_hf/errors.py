"""The exceptions of spin_hf.

    SpinError
     ├── OptionError (ValueError)             an option has a value that cannot work
     │    └── BudgetError                     ... a token or byte budget that cannot hold one step
     ├── OptionTypeError (TypeError)          an option has the wrong type
     ├── UnsupportedModelError (ValueError)   the model cannot be served; the text says why
     ├── AttentionError (ValueError)          attention was called in a way that would give wrong tokens
     ├── BatchSizeError (ValueError)          the batch does not match what the cache holds
     ├── CapacityError (MemoryError)          memory ran out, or a cap would be exceeded
     ├── SavedCacheError (ValueError)         a saved cache is damaged or belongs to another model, or saving failed
     └── CacheStateError (RuntimeError)       the cache's own state is inconsistent or was misused

Every message states what was expected, what was found and the remedy. Every error but CacheStateError leaves the cache as it
was before the call.

The error type tells which allocation failed when memory runs out during a call:

    of the cache       pages, summaries, page frames, tables, step buffers    CapacityError, raised from the allocator's error
    of the forward     activations, attention's temporary tensors             torch.OutOfMemoryError, unchanged

Either way the cache is as before the call, and the same call succeeds once memory is available. Pages that moved to the cpu
tier during the call stay there, as int8 with `cpu_dtype="int8"`.
"""


class SpinError(Exception):
    """Base class of everything that spin_hf raises on purpose."""


class OptionError(SpinError, ValueError):
    """An option has a value that cannot work."""


class _NoRoomError(Exception):
    """Attributes of errors about a cap that is too small.

    Attributes:
        needed_bytes: smallest sufficient cap; None if no cap suffices or the shortage is not one of bytes.
        available_bytes: the cap; None if `needed_bytes` is.
        fitting_batch_size: sequences of the same length that a new cache with these caps holds, 0 if not even one; None if
            `needed_bytes` is.
        row: of a step over several rows (`serving/row_batch.py`): the row that does not fit; None if none is to blame.
    """

    row: int | None = None

    def __init__(
        self, message: str, needed_bytes: int | None = None, available_bytes: int | None = None,
        fitting_batch_size: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.needed_bytes, self.available_bytes = needed_bytes, available_bytes
        self.fitting_batch_size = fitting_batch_size


class BudgetError(_NoRoomError, OptionError):
    """A token or byte budget is too small for one step.

    Attributes:
        needed_bytes: smallest sufficient `gpu_memory`. All three are None if the budget is in tokens.
        available_bytes: the current `gpu_memory`.
        fitting_batch_size: sequences of the same length that fit a new cache with these caps; 0 if not even one.
    """


class OptionTypeError(SpinError, TypeError):
    """An option has the wrong type."""


class UnsupportedModelError(SpinError, ValueError):
    """The model's architecture cannot be served."""


class AttentionError(SpinError, ValueError):
    """Attention was called in a way that would give wrong results."""


class BatchSizeError(SpinError, ValueError):
    """The batch does not match the sequences that the cache holds."""


class CapacityError(_NoRoomError, SpinError, MemoryError):
    """A memory cap would be exceeded, or memory ran out.

    Attributes:
        needed_bytes: smallest sufficient `cpu_memory`. All three are None if memory ran out without a cap.
        available_bytes: the current `cpu_memory`.
        fitting_batch_size: sequences of the same length that fit a new cache with these caps; 0 if not even one.
    """


class SavedCacheError(SpinError, ValueError):
    """A saved cache is damaged, or does not fit the model or the options, or could not be written."""


class CacheStateError(SpinError, RuntimeError):
    """The cache was used in a state that does not allow it, or its invariants do not hold."""


def require_integrity(condition: bool, message: str) -> None:
    """Raise CacheStateError unless `condition` holds."""
    if not condition:
        raise CacheStateError(f"integrity: {message}; please report this as a bug")
