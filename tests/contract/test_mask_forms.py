"""Masks of every form and dtype have the same effect with a SpinCache as with a DynamicCache, or both refuse them.

All forms that a user can pass: on the first forward, and on a filled cache with one new token, with a few and with many. And
the state of the cache after a refused mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask

from spin_hf import AttentionError, BatchSizeError, SpinCache, SpinError
from spin_hf.attention.masks import is_internal, marker_mask, validity_mask
from tests.support.compare import difference
from tests.support.zoo import build_model, random_tokens

ROWS, HEADS, PROMPT = 3, 4, 40
NEW = {"first": PROMPT, "one more": 1, "a few more": 5, "many more": 30}
TOLERANCE = 1e-5

Form = Callable[[Tensor, int], Any]
"""Allowed pairs [B, heads, Q, n] and the number of new tokens -> what the user gives."""


def additive(allowed: Tensor) -> Tensor:
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)


FORMS: dict[str, Form] = {
    "bool [B, h, Q, n]": lambda allowed, new: allowed,
    "bool [B, 1, Q, n]": lambda allowed, new: allowed[:, :1],
    "bool [1, 1, Q, n]": lambda allowed, new: allowed[:1, :1],
    "bool [1, h, Q, n]": lambda allowed, new: allowed[:1],
    "bool [B, 1, 1, n]": lambda allowed, new: allowed[:, :1, -1:],
    "bool [1, 1, 1, n]": lambda allowed, new: allowed[:1, :1, -1:],
    "float [B, h, Q, n]": lambda allowed, new: additive(allowed),
    "float [B, 1, Q, n]": lambda allowed, new: additive(allowed[:, :1]),
    "float [1, 1, Q, n]": lambda allowed, new: additive(allowed[:1, :1]),
    "float [B, 1, 1, n]": lambda allowed, new: additive(allowed[:, :1, -1:]),
    "-inf [B, 1, Q, n]": lambda allowed, new: torch.zeros(allowed[:, :1].shape).masked_fill(
        ~allowed[:, :1], -torch.inf
    ),
    "not causal": lambda allowed, new: torch.ones_like(allowed[:, :1]),
    "one column for all": lambda allowed, new: torch.ones_like(allowed[:, :1, :, :1]),
    "int64 [B, 1, Q, n]": lambda allowed, new: allowed[:, :1].long(),
    "int64 [B, 1, 1, n]": lambda allowed, new: allowed[:, :1, -1:].long(),
    "uint8 [B, 1, 1, n]": lambda allowed, new: allowed[:, :1, -1:].byte(),
    "int64 2-D": lambda allowed, new: allowed[:, 0, -1].long(),
    "bool 2-D": lambda allowed, new: allowed[:, 0, -1],
    "float 2-D": lambda allowed, new: allowed[:, 0, -1].float(),
    "2-D of ones, one row": lambda allowed, new: torch.ones(1, allowed.shape[-1], dtype=torch.long),
    "2-D, longer": lambda allowed, new: torch.nn.functional.pad(allowed[:, 0, -1].long(), (0, 5), value=1),
    "4-D, one column short": lambda allowed, new: allowed[:, :1, :, 1:],
    "4-D, one column more": lambda allowed, new: torch.nn.functional.pad(allowed[:, :1], (0, 1), value=True),
    "4-D, other queries": lambda allowed, new: torch.nn.functional.pad(allowed[:, :1], (0, 0, 0, 1), value=True),
    "4-D, other rows": lambda allowed, new: allowed[:2, :1],
    "4-D, other heads": lambda allowed, new: allowed[:, :3],
}
PADDING = {"int64 2-D", "bool 2-D", "float 2-D", "2-D, longer"}
REFUSED = {name for name in FORMS if name.startswith(("int64 [", "uint8", "4-D"))}


def allowed_pairs(length: int, new: int, padded: bool) -> Tensor:
    """[B, heads, new, length]: causal, some tokens hidden from each head; with `padded` two sequences begin with padding."""
    causal = torch.arange(length) <= torch.arange(length - new, length)[:, None]
    if padded:
        hidden = torch.zeros(ROWS, 1, 1, length, dtype=torch.bool)
        hidden[0, ..., :7] = hidden[1, ..., :3] = True
        return (causal & ~hidden).expand(ROWS, HEADS, -1, -1)
    seen = torch.rand(ROWS, HEADS, new, length, generator=torch.Generator().manual_seed(length)) < 0.7
    seen |= torch.arange(length) == torch.arange(length - new, length)[:, None]
    return causal & seen


def both(run: Callable[[Any], Tensor], model: Any) -> list[Tensor | Exception]:
    """The results of `run` with each of the two caches."""
    results: list[Tensor | Exception] = []
    for cache in (DynamicCache(config=model.config), SpinCache(model, budget=1 << 20)):
        try:
            with torch.no_grad():
                results.append(run(cache))
        except Exception as error:  # compared below
            results.append(error)
    return results


@pytest.mark.parametrize("when", NEW)
@pytest.mark.parametrize("name", FORMS)
def test_as_a_dynamic_cache_reads_it(name: str, when: str) -> None:
    model, new = build_model("llama"), NEW[when]
    length = PROMPT if when == "first" else PROMPT + new
    ids = random_tokens(ROWS, length)
    allowed = allowed_pairs(length, new, name in PADDING)
    given = FORMS[name](allowed, new)
    real = given[:, length - new : length].bool() if name in PADDING else torch.ones(ROWS, new, dtype=torch.bool)

    def run(cache: Any) -> Tensor:
        if when != "first":
            model(ids[:, :PROMPT], past_key_values=cache)
        logits = model(ids[:, length - new :], attention_mask=given, past_key_values=cache).logits
        return logits[real]

    def run_unpadded(cache: Any) -> Tensor:
        if when != "first":
            model(ids[:, :PROMPT], past_key_values=cache)
        return model(ids[:, length - new :], past_key_values=cache).logits[real]

    theirs, ours = both(run, model)
    if name in REFUSED:
        assert isinstance(ours, SpinError), ours
        if new > 1 or name != "4-D, other queries":  # torch repeats a single query for each row of the mask
            assert isinstance(theirs, Exception), "a DynamicCache serves this"
        return
    assert isinstance(ours, Tensor), ours
    if name == "2-D of ones, one row" and isinstance(theirs, Exception):
        theirs = both(run_unpadded, model)[0]
    assert isinstance(theirs, Tensor), theirs
    assert difference(ours, theirs) <= TOLERANCE


def test_a_mask_over_columns_is_no_padding() -> None:
    """A bool mask [B, 1, 1, n] lets each query see later tokens: it replaces the causal mask."""
    model, ids = build_model("llama"), random_tokens(ROWS, PROMPT)
    given = torch.ones(ROWS, 1, 1, PROMPT, dtype=torch.bool)
    with torch.no_grad():
        causal = model(ids, past_key_values=SpinCache(model)).logits
        as_given = model(ids, attention_mask=given, past_key_values=SpinCache(model)).logits
    assert difference(as_given, causal) > 0.01


@pytest.mark.parametrize(
    ("name", "form"), [("4-D", "bool"), ("4-D", "float"), ("2-D", "bool"), ("2-D", "float"), ("2-D", "int64")]
)
def test_a_conversation_of_given_masks(form: str, name: str) -> None:
    """Prefill, three steps, more tokens and a step, each with its own mask; then padding takes over again."""
    model, ids = build_model("llama"), random_tokens(ROWS, 70)
    stops = [40, 41, 42, 43, 60, 61]

    def run(cache: Any) -> Tensor:
        start, logits = 0, []
        for stop in stops:
            allowed = allowed_pairs(stop, stop - start, name == "2-D")
            mask = allowed[:, :1] if name == "4-D" else allowed[:, 0, -1]
            given = {"bool": mask, "float": mask.float() if name == "2-D" else additive(mask), "int64": mask.long()}
            out = model(ids[:, start:stop], attention_mask=given[form], past_key_values=cache).logits
            logits.append(out[:, -1])
            start = stop
        logits.append(model(ids[:, start : start + 1], past_key_values=cache).logits[:, -1])
        return torch.stack(logits)

    theirs, ours = both(run, model)
    assert isinstance(theirs, Tensor), theirs
    assert isinstance(ours, Tensor), ours
    assert difference(ours, theirs) <= TOLERANCE


@pytest.mark.parametrize("when", NEW)
@pytest.mark.parametrize("form", ["None", "bool", "float", "columns"])
def test_masks_by_layer_type(form: str, when: str) -> None:
    """A dictionary of masks, as models with windows take them."""
    model, new = build_model("gemma3_text"), NEW[when]
    length = PROMPT if when == "first" else PROMPT + new
    ids = random_tokens(ROWS, length)

    def run(cache: Any) -> Tensor:
        if when != "first":
            model(ids[:, :PROMPT], past_key_values=cache)
        sliding = cache.get_mask_sizes(new, 0)[0]
        window = torch.arange(length)[-sliding:]
        queries = torch.arange(length - new, length)[:, None]
        near = ((window <= queries) & (window > queries - model.config.sliding_window))[None, None]
        full = allowed_pairs(length, new, False)[:, :1]
        given = {"None": None, "bool": full, "float": additive(full), "columns": full[:, :, -1:]}[form]
        masks = {"full_attention": given, "sliding_attention": near.expand(ROWS, -1, -1, -1)}
        if form == "None" and new not in (1, length):  # sdpa takes None for causal among equally many
            masks["full_attention"] = (torch.arange(length) <= queries)[None, None].expand(ROWS, -1, -1, -1)
        return model(ids[:, length - new :], attention_mask=masks, past_key_values=cache).logits

    theirs, ours = both(run, model)
    assert isinstance(theirs, Tensor), theirs
    assert isinstance(ours, Tensor), ours
    assert difference(ours, theirs) <= TOLERANCE


def test_block_mask() -> None:
    model, ids = build_model("llama"), random_tokens(ROWS, PROMPT)
    block = create_block_mask(lambda b, h, q, kv: q >= kv, None, None, PROMPT, PROMPT, device="cpu")
    cache = SpinCache(model)
    with pytest.raises(AttentionError, match="expected a tensor, got a BlockMask"):
        model(ids, attention_mask=block, past_key_values=cache)
    with torch.no_grad():
        assert torch.isfinite(model(ids, past_key_values=cache).logits).all()


BAD: dict[str, tuple[Callable[[int], Tensor], type[SpinError], str]] = {
    "integers": (lambda n: torch.ones(ROWS, 1, 1, n, dtype=torch.int32), AttentionError, r"pass mask.bool\(\)"),
    "another batch's": (
        lambda n: torch.ones(2, n, dtype=torch.long).tril(),
        BatchSizeError,
        "a row for each of the 3",
    ),
    "one row for all": (lambda n: torch.ones(1, n, dtype=torch.long).tril(), BatchSizeError, "a row for each of the 3"),
    "three dimensions": (lambda n: torch.ones(ROWS, n, n, dtype=torch.bool), AttentionError, "expected 2 dimensions"),
    "too short": (lambda n: torch.ones(ROWS, 1, 1, n - 3, dtype=torch.bool), AttentionError, "over 3 sequences"),
    "no rows of this batch": (lambda n: torch.ones(2, 1, 1, n, dtype=torch.bool), AttentionError, "over 3 sequences"),
}


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("name", BAD)
def test_a_refused_mask_changes_nothing(name: str, behind: bool) -> None:
    """The error names the remedy. The same forward with a good mask continues from the same state."""
    model, ids = build_model("llama"), random_tokens(ROWS, PROMPT)
    make, error, text = BAD[name]
    held = 30 if behind else 0
    with torch.no_grad():
        caches = [SpinCache(model, budget=16) for _ in range(2)]
        if behind:
            for cache in caches:
                model(ids[:, :held], past_key_values=cache)
        with pytest.raises(error, match=text):
            model(ids[:, held:], attention_mask=make(PROMPT), past_key_values=caches[0])
        assert caches[0].get_seq_length() == held
        outputs = [model(ids[:, held:], past_key_values=cache).logits for cache in caches]
    assert torch.equal(*outputs)
    for cache in caches:
        cache.check_integrity()


def test_padding_of_a_forward_that_failed_is_not_taken_for_the_next_ones() -> None:
    """The padding that the mask function records belongs to its own forward."""
    model, ids = build_model("llama"), random_tokens(ROWS, PROMPT)
    padding = torch.ones(ROWS, PROMPT, dtype=torch.long)
    padding[:, :9] = 0
    cache = SpinCache(model, budget=1 << 20)
    embeds = model.get_input_embeddings()(ids)
    create_causal_mask(model.config, embeds, padding, cache)  # and then something failed
    causal = torch.ones(PROMPT, PROMPT, dtype=torch.bool).tril()[None, None]
    with torch.no_grad():
        model(ids, attention_mask=causal, past_key_values=cache)
        more = model(ids[:, :1], past_key_values=cache).logits
        expected = model(torch.cat([ids, ids[:, :1]], 1)).logits[:, -1:]
    assert difference(more, expected) <= TOLERANCE


@pytest.mark.parametrize("given", ["4-D bool", "4-D float"])
def test_generate_with_a_given_mask(given: str) -> None:
    """`generate` can be given a 4-D mask for a single token, as transformers does not lengthen it."""
    model, ids = build_model("llama"), random_tokens(ROWS, PROMPT)
    allowed = allowed_pairs(PROMPT, PROMPT, False)[:, :1]
    mask = allowed if given == "4-D bool" else additive(allowed)

    def run(cache: Any) -> Tensor:
        out = model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=1, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        return out.logits[0]  # type: ignore[no-any-return]

    theirs, ours = both(run, model)
    if isinstance(theirs, Exception):
        assert type(ours) is type(theirs)
    else:
        assert isinstance(ours, Tensor), ours
        assert difference(ours, theirs) <= TOLERANCE


def test_masks_of_the_cache_have_shapes_of_their_own() -> None:
    """None of the forms above is taken for one that the cache made."""
    valid = torch.ones(ROWS, PROMPT, dtype=torch.bool)
    assert is_internal(validity_mask(valid))
    assert is_internal(marker_mask(valid, PROMPT))
    for form in FORMS.values():
        assert not is_internal(form(allowed_pairs(PROMPT, PROMPT, False), PROMPT))


def test_a_mask_over_no_tokens_is_refused() -> None:
    """It has the form of the cache's own, and none was made for this forward."""
    model, ids = build_model("llama"), random_tokens(ROWS, PROMPT)
    with pytest.raises(AttentionError, match="got one over none"):
        model(ids, attention_mask=torch.ones(ROWS, 1, PROMPT, 0, dtype=torch.bool), past_key_values=SpinCache(model))


@pytest.mark.parametrize("padded", [False, True])
def test_masks_that_move_between_devices(padded: bool) -> None:
    """Hooks that move a layer's inputs copy tensors, attributes of theirs not: what is padding is known all the same."""
    model, ids = build_model("llama"), random_tokens(ROWS, PROMPT)
    padding = torch.ones(ROWS, PROMPT, dtype=torch.long)
    if padded:
        padding[0, :9] = 0

    def copied(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {k: v.clone() if isinstance(v, Tensor) else v for k, v in kwargs.items()}

    for layer in model.model.layers:
        layer.register_forward_pre_hook(copied, with_kwargs=True)

    def run(cache: Any) -> Tensor:
        first = model(ids, attention_mask=padding, past_key_values=cache).logits[:, -1]
        longer = torch.nn.functional.pad(padding, (0, 1), value=1)
        return torch.stack([first, model(ids[:, :1], attention_mask=longer, past_key_values=cache).logits[:, -1]])

    theirs, ours = both(run, model)
    assert isinstance(theirs, Tensor), theirs
    assert isinstance(ours, Tensor), ours
    assert difference(ours, theirs) <= TOLERANCE
