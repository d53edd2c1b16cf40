"""spin_hf: SPIN (arXiv 2604.26837) for Hugging Face transformers, a paged KV cache with sparse attention.

    model.generate(**inputs, past_key_values=SpinCache(model))      one call
    with enable(model): ...                                         every call inside, also of pipelines
    print(plan(model, context_length=131072))                       memory that a cache will take
    generate_batch(model, prompts)                                  many prompts; RequestLoop: requests at any time

Public are the names in `__all__`, and in `spin_hf.attention.methods.__all__` for a method of your own. Everything else is
private and may change. Importing registers the attention implementation "spin" with transformers, and nothing else.
"""

from .attention.methods import Bisection, Fitted, Method, PageMethod, Quest, RetroInfer, SeerAttention, ShadowKV
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
    SavedCacheError,
    SpinError,
    UnsupportedModelError,
)
from .memory.plan import MemoryPlan, plan
from .persistence.prompt_store import PromptStore, StoreStats
from .serving.events import EventLog
from .serving.generate_batch import generate_batch
from .serving.handle import RequestHandle
from .serving.loop import RequestLoop
from .serving.loop_stats import LoopStats
from .serving.results import RequestResult, RequestTimes
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
    "EventLog",
    "Fitted",
    "LoopStats",
    "MemoryPlan",
    "Method",
    "OptionError",
    "OptionTypeError",
    "PageMethod",
    "PromptStore",
    "Quest",
    "RequestHandle",
    "RequestLoop",
    "RequestResult",
    "RequestTimes",
    "RetroInfer",
    "SavedCacheError",
    "SeerAttention",
    "ShadowKV",
    "SpinCache",
    "SpinError",
    "StoreStats",
    "UnsupportedModelError",
    "__version__",
    "disable",
    "enable",
    "generate_batch",
    "plan",
]
