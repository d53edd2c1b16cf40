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
"""


class SpinError(Exception):
    """Base class of everything that spin_hf raises on purpose."""


class OptionError(SpinError, ValueError):
    """An option has a value that cannot work."""


class BudgetError(OptionError):
    """A token or byte budget is too small for one step.

    Attributes:
        needed_bytes: the smallest cap that would do, or None where the budget is counted in tokens.
    """

    def __init__(self, message: str, needed_bytes: int | None = None) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes


class OptionTypeError(SpinError, TypeError):
    """An option has the wrong type."""


class UnsupportedModelError(SpinError, ValueError):
    """The model's architecture cannot be served."""


class AttentionError(SpinError, ValueError):
    """Attention was called in a way that the cache cannot serve exactly."""


class BatchSizeError(SpinError, ValueError):
    """The batch does not match the sequences that the cache holds."""


class CapacityError(SpinError, MemoryError):
    """A memory cap would be exceeded."""


class CacheStateError(SpinError, RuntimeError):
    """The cache was used in a state that does not allow it, or its invariants do not hold."""
