"""The exceptions of spin_hf.

    SpinError
     ├── OptionError (ValueError)             an option has a value that cannot work
     │    └── BudgetError                     ... a token or byte budget that cannot hold one step
     ├── OptionTypeError (TypeError)          an option has the wrong type
     ├── UnsupportedModelError (ValueError)   the model cannot be served; the text says why
     ├── AttentionError (ValueError)          attention was called in a way that would give wrong tokens
     ├── BatchSizeError (ValueError)          the batch does not match what the cache holds
     ├── CapacityError (MemoryError)          memory ran out, or a cap would be exceeded
     └── CacheStateError (RuntimeError)       the cache's own state is inconsistent or was misused

Every message says what was expected, what was found and what to do. An error is raised before the cache changes, so
what it holds stays usable.

When memory runs out under way, the error says whose it was:

    what the cache keeps            pages, summaries, page frames, tables, buffers of steps    CapacityError, from the refusal
    what a forward computes with    its own tensors and the model's                         torch.OutOfMemoryError, as it came

Either way the cache is what it was before the call, and the same call works once there is memory. Pages that went to the cpu
tier under way stay there, with `cpu_dtype="int8"` as int8.
"""


class SpinError(Exception):
    """Base class of everything that spin_hf raises on purpose."""


class OptionError(SpinError, ValueError):
    """An option has a value that cannot work."""


class _NoRoomError(Exception):
    """What an error knows about a cap that is too small.

    Attributes:
        needed_bytes: the smallest cap that would do; None where no cap would, or what is short is not counted in bytes.
        available_bytes: the cap; None with the above.
        fitting_batch_size: how many sequences of the same length a new cache with these caps holds, 0 if not even one;
            None with the above.
    """

    def __init__(
        self,
        message: str,
        needed_bytes: int | None = None,
        available_bytes: int | None = None,
        fitting_batch_size: int | None = None,
    ) -> None:
        super().__init__(message)
        self.needed_bytes, self.available_bytes = needed_bytes, available_bytes
        self.fitting_batch_size = fitting_batch_size


class BudgetError(_NoRoomError, OptionError):
    """A token or byte budget is too small for one step.

    Attributes:
        needed_bytes: the smallest `gpu_memory` that would do; None where the budget is counted in tokens, as the others.
        available_bytes: the `gpu_memory` that there is.
        fitting_batch_size: how many sequences of the same length fit a new cache with these caps; 0 if not even one.
    """


class OptionTypeError(SpinError, TypeError):
    """An option has the wrong type."""


class UnsupportedModelError(SpinError, ValueError):
    """The model's architecture cannot be served."""


class AttentionError(SpinError, ValueError):
    """Attention was called in a way that the cache cannot serve exactly."""


class BatchSizeError(SpinError, ValueError):
    """The batch does not match the sequences that the cache holds."""


class CapacityError(_NoRoomError, SpinError, MemoryError):
    """A memory cap would be exceeded, or memory ran out.

    Attributes:
        needed_bytes: the smallest `cpu_memory` that would do; None where it is no cap that is short, as the others.
        available_bytes: the `cpu_memory` that there is.
        fitting_batch_size: how many sequences of the same length fit a new cache with these caps; 0 if not even one.
    """


class CacheStateError(SpinError, RuntimeError):
    """The cache was used in a state that does not allow it, or its invariants do not hold."""
