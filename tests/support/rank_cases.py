"""What the ranks of a tensor-parallel model do in tests. Every rank calls the same case, and returns what can be pickled.

@case def name(...)      enters CASES under its name
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.distributed import DistributedConfig

import spin_hf.forward_pass as admission_users
from spin_hf import CapacityError, PromptStore, SpinCache, SpinError
from spin_hf.config import SpinOptions
from spin_hf.graph import eligibility, runner
from spin_hf.integration.rank_agreement import Ranks
from spin_hf.integration.tensor_parallel import splits_heads
from spin_hf.persistence import files
from spin_hf.storage.chunked_array import ChunkedArray
from spin_hf.storage.page_frames import PageFrames
from tests.support.all_modes import MODES
from tests.support.compare import Trace
from tests.support.inspection import state_of
from tests.support.memory import with_tight_gpu_memory
from tests.support.subjects import Subject
from tests.support.tuning import tuned
from tests.support.zoo import PAD_TOKEN_ID, left_padded, random_tokens

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

    def adopt(self, cache: DynamicCache) -> Any:
        """With the heads of this rank."""
        if splits_heads(self.model):
            for layer in cache.layers:
                for name in ("keys", "values"):
                    parts = getattr(layer, name).chunk(dist.get_world_size(), 1)
                    setattr(layer, name, parts[dist.get_rank()])
        self.caches.append(SpinCache.from_cache(cache, self.model, **(self.options or {})))
        return self.caches[-1]

    def restart(self, cache: Any) -> Any:
        cache.reset()
        return cache


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


def sequences(model: Any, cache: Any, ids: torch.Tensor, new: int = 24, **options: Any) -> torch.Tensor:
    """Greedy tokens [B, n] of a prompt."""
    options = {"attention_mask": torch.ones_like(ids), **options}
    given = {name: value.to(model.device) if torch.is_tensor(value) else value for name, value in options.items()}
    made: torch.Tensor = model.generate(
        ids.to(model.device), past_key_values=cache, max_new_tokens=new, do_sample=False, **given
    )
    return made.cpu()


@case
def generated(folder: str, options: dict[str, Any], rows: int, length: int, new: int = 24) -> Any:
    """Tokens, and the numbers of `stats`: of this rank, and of all of them."""
    model = rank_model(folder)
    cache = SpinCache(model, **options)
    tokens = sequences(model, cache, random_tokens(rows, length), new)
    cache.check_integrity()
    return tokens, asdict(cache.stats()), asdict(cache.stats(all_ranks=True))


@case
def options_by_rank(folder: str, options: list[dict[str, Any]]) -> dict[str, Any]:
    """Caps of a cache that each rank makes with options of its own."""
    cache = SpinCache(rank_model(folder), **options[dist.get_rank()])
    chosen = state_of(cache).options
    return {"gpu_memory": chosen.gpu_memory, "cpu_memory": chosen.cpu_memory}


@case
def tuning_by_rank() -> dict[str, Any]:
    """The tuning of options that are parsed now."""
    return asdict(SpinOptions.parse().tuning)


@case
def batches_by_rank(folder: str, lengths: list[int]) -> None:
    """A prompt of another length on each rank."""
    model = rank_model(folder)
    cache = SpinCache(model)
    with torch.no_grad():
        model(random_tokens(1, lengths[dist.get_rank()]), past_key_values=cache)


class _OutOfMemory:
    """Refuses memory from one allocation on, on one rank.

    Args:
        where: a class and the name of its method.
        skips: calls of it that succeed.
    """

    def __init__(self, where: tuple[Any, str], rank: int, skips: int) -> None:
        self.where, self.left, self.active = where, skips, dist.get_rank() == rank
        self.hits = 0

    def __enter__(self) -> _OutOfMemory:
        owner, name = self.where
        self.before = original = getattr(owner, name)

        def refuse(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.active and self.left < 0:
                self.hits += 1
                raise CapacityError("pages and summaries: 4096 bytes more for a test and got none")
            return original(*args, **kwargs)

        setattr(owner, name, refuse)
        return self

    def __exit__(self, *_: Any) -> None:
        setattr(self.where[0], self.where[1], self.before)


PLACES: dict[str, tuple[Any, str]] = {
    "pages": (ChunkedArray, "_new_slabs"),
    "frames": (PageFrames, "resize"),
    "first batch": (admission_users, "check_first_batch"),
    "copies": (ChunkedArray, "copy_blocks"),
}
"""Where memory runs out."""


STEPS = 12


def prompt_and_steps() -> list[torch.Tensor]:
    """A prompt of two sequences that ends shortly before a segment of pages of 4 tokens does, and tokens behind it."""
    return [random_tokens(2, 121), *random_tokens(2, STEPS, seed=3).split(1, 1)]


@torch.no_grad()
def last_logits(model: Any, cache: Any, steps: list[torch.Tensor]) -> list[torch.Tensor]:
    """Logits behind each of the steps."""
    return [model(step.to(model.device), past_key_values=cache).logits[:, -1].cpu() for step in steps]


@case
def out_of_memory(folder: str, place: str, skips: int, in_steps: bool, options: dict[str, Any]) -> Any:
    """Rank 1 runs out of memory in the prompt, in a step, or in a copy; the same call then succeeds.

    Returns:
        the error of this rank; whether this rank has run out; tokens held before and after; logits of all steps.
    """
    model, steps = rank_model(folder), prompt_and_steps()
    with tuned(min_chunk_segments=1, cpu_chunk_bytes=1, gpu_chunk_bytes=1):
        cache = SpinCache(model, **options)
    logits = last_logits(model, cache, steps[: int(in_steps)])
    found, held = None, (0, 0)
    with _OutOfMemory(PLACES[place], 1, skips) as memory:
        while len(logits) < len(steps):
            before = cache.get_seq_length()
            try:
                if place == "copies":
                    cache.reorder_cache(torch.tensor([0, 0]))
                logits += last_logits(model, cache, [steps[len(logits)]])
            except SpinError as error:
                found, held = f"{type(error).__name__}: {error}", (before, cache.get_seq_length())
                break
    cache.check_integrity()
    if len(logits) < len(steps):
        logits += last_logits(model, cache, steps[len(logits) :])
    return found, memory.hits > 0, held, torch.stack(logits)


def save_and_go_on(model: Any, target: str, options: dict[str, Any], lengths: list[int]) -> torch.Tensor:
    """Save a cache behind a prompt and some tokens. Returns the tokens that it goes on with."""
    cache = SpinCache(model, **options)
    ids, mask = left_padded(lengths)
    made = sequences(model, cache, ids, 9, attention_mask=mask)
    cache.save_pretrained(target, made)
    return _go_on(model, cache, made, mask)


def load_and_go_on(model: Any, target: str, options: dict[str, Any], lengths: list[int]) -> torch.Tensor:
    """Load what `save_and_go_on` has saved, and go on."""
    cache = SpinCache.from_pretrained(target, model, **options)
    cache.check_integrity()
    made = state_of(cache).tokens.ids(cache.get_seq_length())
    assert made is not None
    return _go_on(
        model, cache, torch.cat([made.long().cpu(), random_tokens(len(made), 1, seed=5)], 1), left_padded(lengths)[1]
    )


def _go_on(model: Any, cache: SpinCache, made: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    ids = torch.cat([made[:, : cache.get_seq_length()], random_tokens(len(made), 1, seed=5)], 1)
    more = torch.ones(len(ids), ids.shape[1] - mask.shape[1], dtype=torch.long)
    return sequences(model, cache, ids, 12, attention_mask=torch.cat([mask, more], 1))


@case
def saved(folder: str, target: str, options: dict[str, Any], lengths: list[int]) -> torch.Tensor:
    """`save_and_go_on`."""
    return save_and_go_on(rank_model(folder), target, options, lengths)


@case
def restored(folder: str, target: str, options: dict[str, Any], lengths: list[int]) -> torch.Tensor:
    """`load_and_go_on`."""
    return load_and_go_on(rank_model(folder), target, options, lengths)


@case
def saved_without_room(folder: str, target: str, lengths: list[int]) -> None:
    """Rank 1 cannot write."""

    def refuse(*_: Any) -> None:
        raise OSError("no space left on device")

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(files, "switch", refuse)
        save_and_go_on(rank_model(folder), target, {}, lengths)


@case
def makes(folder: str, kind: str) -> None:
    """A cache that is refused on a tensor-parallel model."""
    model = rank_model(folder)
    if kind == "store":
        SpinCache(model, store=PromptStore())
    elif kind == "config":
        SpinCache(model.config)
    else:
        raise AssertionError(kind)


@case
def captured(folder: str, options: dict[str, Any], fails_on: int | None = None) -> Any:
    """Decode with captured steps, as on a GPU, by interpreted kernels. `fails_on` names a rank that cannot capture.

    Returns:
        tokens; replays; why steps are not captured; meetings of the ranks in the last 4 steps.
    """
    from tests.support.graph_recorder import FakeCapturedStep, capture_on_cpu

    forget_models()  # a model keeps its graphs
    model = rank_model(folder)
    with pytest.MonkeyPatch.context() as patch:
        recorder = capture_on_cpu(patch)
        patch.setattr(eligibility, "captures_collectives", lambda model: True)
        if fails_on == dist.get_rank():
            capture = FakeCapturedStep.capture

            def refuse(*arguments: Any) -> None:
                capture(*arguments)  # a fake capture computes, together with the other ranks
                raise RuntimeError("this rank cannot capture")

            patch.setattr(FakeCapturedStep, "capture", refuse)
        cache = SpinCache(model, **options)
        tokens = sequences(model, cache, random_tokens(1, 41), 4)
        exchanged, exchange = [], Ranks._exchanged

        def count(self: Ranks, what: str, *arguments: Any) -> Any:
            exchanged.append(what)
            return exchange(self, what, *arguments)

        patch.setattr(Ranks, "_exchanged", count)
        token = tokens[:, -1:]
        with torch.no_grad():
            for _ in range(4):
                token = model(token, past_key_values=cache).logits.argmax(-1)
                tokens = torch.cat([tokens, token], 1)
        cache.check_integrity()
        assert cache.calls.steps is not None
        refused = cache.calls.steps.refused
    return tokens, recorder.replays, refused, exchanged


@case
def on_gpu(folder: str, options: dict[str, Any], calls: list[dict[str, Any]], tight: bool = False) -> Any:
    """Tokens of calls of `generate` on GPUs, for prompts of 73 and 58 tokens.

    Args:
        tight: with the smallest `gpu_memory` that each call accepts.
    Returns:
        tokens of each call; steps captured by each; why steps are not captured.
    """
    model = rank_model(folder)
    found, captured, refused = [], [], None
    for call in calls:
        tokens, cache = read_and_generate(model, options, call, tight)
        found.append(tokens)
        steps = cache.calls.steps
        captured.append(0 if steps is None else sum(step is not None for step in steps.captured.values()))
        refused = None if steps is None else steps.refused
    return found, captured, refused


def read_and_generate(
    model: Any, options: dict[str, Any], call: dict[str, Any], tight: bool
) -> tuple[torch.Tensor, SpinCache]:
    """Tokens and cache of one call of `generate`, for two prompts. Arguments as for `on_gpu`."""
    ids, mask = left_padded([73, 58])

    def run(caps: dict[str, int]) -> tuple[torch.Tensor, SpinCache]:
        cache = SpinCache(model, **options, **caps)
        tokens = sequences(model, cache, ids, 12, attention_mask=mask, **call)
        cache.check_integrity()
        return tokens, cache

    if not tight:
        return run({})
    tokens, cache = with_tight_gpu_memory(lambda cap: run({"gpu_memory": cap}))
    assert cache.stats().cpu_bytes > 0
    return tokens, cache


@case
def cannot_capture(folder: str, options: dict[str, Any], rank: int) -> Any:
    """As `on_gpu`, where one rank fails within a capture."""
    captures = runner.CapturedStep.capture

    def refuse(self: Any, forward: Any, *others: Any) -> None:
        def fail(*args: Any, **kwargs: Any) -> None:
            forward(*args, **kwargs)
            raise RuntimeError("this rank cannot capture")

        captures(self, fail, *others)

    forget_models()  # a model keeps its graphs
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == rank:
            patch.setattr(runner.CapturedStep, "capture", refuse)
        return on_gpu(folder, options, [{}])
