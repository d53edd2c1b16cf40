"""What the ranks of a tensor-parallel model do in tests. Every rank calls the same case, and returns what can be pickled.

@case def name(...)      enters CASES under its name
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.distributed import DistributedConfig

from spin_hf import SpinCache
from tests.support.all_modes import MODES
from tests.support.compare import Trace
from tests.support.subjects import Subject
from tests.support.zoo import PAD_TOKEN_ID

CASES: dict[str, Callable[..., Any]] = {}
GATHERED = {
    "model.layers.*.self_attn.q_proj": "colwise_gather_output", "model.layers.*.self_attn.k_proj": "colwise_gather_output",
    "model.layers.*.self_attn.v_proj": "colwise_gather_output", "model.layers.*.self_attn.o_proj": "rowwise_split_input",
}  # fmt: skip
"""A plan with all heads on each rank, for models with fewer KV heads than ranks."""

_models: dict[Any, Any] = {}


def case(function: Callable[..., Any]) -> Callable[..., Any]:
    """Register a case under its function's name."""
    CASES[function.__name__] = function
    return function


def forget_models() -> None:
    """Drop the models. Their process group ends."""
    _models.clear()


def rank_model(folder: str, gathers: bool = False) -> Any:
    """The model of a folder, distributed over all ranks."""
    key = folder, gathers
    if key not in _models:
        plan = GATHERED if gathers else None
        config = DistributedConfig(tp_size=dist.get_world_size(), tp_plan=plan)
        model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config).eval()
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, PAD_TOKEN_ID
        _models[key] = model
    return _models[key]


class RankSubject(Subject):
    """A tensor-parallel model with SpinCache, or with DynamicCache if `options` is None."""

    def __init__(self, family: str, folder: str, gathers: bool, options: dict[str, Any] | None) -> None:
        super().__init__(family, rank_model(folder, gathers))
        self.options = options

    def _make(self) -> Any:
        if self.options is None:
            return DynamicCache(config=self.model.config)
        return SpinCache(self.model, **self.options)


@case
def traces(
    family: str, folder: str, modes: list[str], options: dict[str, Any] | None, gathers: bool = False
) -> dict[str, Trace]:
    """The traces of some modes."""
    found = {}
    for name in modes:
        subject = RankSubject(family, folder, gathers, options)
        found[name] = MODES[name](subject)
        for cache in subject.caches:
            if isinstance(cache, SpinCache):
                cache.check_integrity()
    return found
