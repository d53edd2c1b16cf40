"""spin_hf: SPIN (arXiv 2604.26837) for Hugging Face transformers.

    model.generate(**inputs, past_key_values=SpinCache(model))

Importing registers the attention implementation "spin" with transformers, and does nothing else.
"""

from .attention.methods.base import Method, PageMethod
from .attention.methods.bisection import Bisection
from .attention.methods.quest import Quest
from .attention.methods.retroinfer import RetroInfer
from .attention.methods.seer import SeerAttention
from .attention.methods.shadowkv import ShadowKV
from .cache import SpinCache
from .enable import disable, enable
from .errors import (
    AttentionError,
    BatchSizeError,
    BudgetError,
    CacheStateError,
    CapacityError,
    OptionError,
    OptionTypeError,
    SpinError,
    UnsupportedModelError,
)
from .memory.plan import MemoryPlan, plan
from .stats import CacheStats

__version__ = "0.1.0"

__all__ = [
    "AttentionError",
    "BatchSizeError",
    "Bisection",
    "BudgetError",
    "CacheStateError",
    "CacheStats",
    "CapacityError",
    "MemoryPlan",
    "Method",
    "OptionError",
    "OptionTypeError",
    "PageMethod",
    "Quest",
    "RetroInfer",
    "SeerAttention",
    "ShadowKV",
    "SpinCache",
    "SpinError",
    "UnsupportedModelError",
    "__version__",
    "disable",
    "enable",
    "plan",
]
