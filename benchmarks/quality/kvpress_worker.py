"""kvpress's side of a comparison: `python kvpress_worker.py job.json`, in the environment that `kvpress_rivals.py` builds.

    job      {"model": folder, "cases": [case]}
    case     {"key", "ids": prompt, "context": tokens of it before the question, "presses": [{"cell", "press", "kept"}],
              "following": ids that are forced behind it, "dense": file of log-probabilities, from the prompt's last
              token on}                                                    teacher forcing, or
             {..., "new_tokens": most, "stop": ids}                        a greedy answer
    reply    a line of JSON for each case and press: {"case", "cell", "attended_tokens", and "tokens" or a KL}

A prompt is prefilled once, densely, with kvpress's hooks on every attention layer; each press chooses from what that prefill
holds, as it would in a prefill of its own, because a press acts on a layer's cache after the layer's attention. What is
measured begins with the last token of the prompt, decoded anew from what is kept, at the positions of the uncompressed text: so
the first token of an answer is no gift of the dense prefill, as it is none to the other methods.

    snapkv, knorm, tova, streamingllm   score the whole prompt, question and last token included; kept - 1 tokens per KV head
                                        beside the last one. The first step attends to `kept`, later ones to what was decoded
                                        since as well
    snapkv8                             SnapKV with a window of 8 tokens instead of kvpress's 64, all of them the question's
    ... unseen                          compress what stands before the question to `kept`; the question's tokens come on top
    decoding knorm, decoding tova       `DecodingPress(compression_interval=1)`: the token before the last is decoded with all
                                        before it; each step then leaves kept - 1 tokens, so that the next attends to `kept`
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from divergence import divergence
from kvpress import BasePress, DecodingPress, KnormPress, SnapKVPress, StreamingLLMPress, TOVAPress
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils.logging import disable_progress_bar

BASES = {
    "snapkv": SnapKVPress, "snapkv8": partial(SnapKVPress, window_size=8), "knorm": KnormPress, "tova": TOVAPress,
    "streamingllm": StreamingLLMPress,
}  # fmt: skip


class Every(BasePress):  # type: ignore[misc]
    """Lets several presses compress one prefill, and leaves the prefill as it is.

    Attributes:
        compressed: by cell, keys and values of every layer.
    """

    def __init__(self, presses: list[dict[str, Any]], context: int) -> None:
        self.presses, self.context = presses, context
        self.compressed: dict[str, list[tuple[Tensor, Tensor]]] = {one["cell"]: [] for one in presses}

    def compress(self, module: Any, hidden: Tensor, keys: Tensor, values: Tensor, _: Any, kwargs: Any) -> Any:
        """Called by kvpress after a layer's attention."""
        for one in self.presses:
            name, _, unseen = one["press"].partition(" ")
            length = self.context if unseen else keys.shape[2]
            press = BASES[name](compression_ratio=1 - (one["kept"] + 0.5) / length)
            if unseen:
                seen = {**kwargs, "position_embeddings": [part[:, :length] for part in kwargs["position_embeddings"]]}
                pair = press.compress(
                    module, hidden[:, :length], keys[:, :, :length], values[:, :, :length], None, seen
                )
            else:
                scores = press.score(module, hidden, keys, values, None, kwargs).clone()
                scores[:, :, -1] = float("-inf")  # decoded anew
                index = scores.topk(one["kept"] - 1, dim=-1).indices.unsqueeze(-1)
                pair = tuple(states.gather(2, index.expand(-1, -1, -1, states.shape[-1])) for states in (keys, values))
            assert pair[0].shape[2] == one["kept"] - (not unseen), f"{one}: {name} kept {pair[0].shape[2]} tokens"
            self.compressed[one["cell"]].append(pair)
        return keys, values


def filled(pairs: list[tuple[Tensor, Tensor]], length: int | None = None) -> DynamicCache:
    """A cache of its own with the first `length` of these keys and values."""
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(pairs):
        cache.update(keys[:, :, :length].clone(), values[:, :, :length].clone(), layer)
    return cache


def step(model: Any, cache: DynamicCache, ids: list[int], position: int) -> Tensor:
    """Logits [vocabulary] after `ids`, the first of which stands at `position` of the uncompressed text."""
    positions = torch.arange(position, position + len(ids))[None]
    out = model(torch.tensor([ids]), past_key_values=cache, position_ids=positions, logits_to_keep=1)
    return out.logits[0, -1].float()


def follow(model: Any, cache: DynamicCache, case: dict[str, Any]) -> dict[str, Any]:
    """Decode from a cache of all but the last token of the prompt: a forced continuation's KL, or an answer."""
    ids = case["ids"]
    logits = step(model, cache, ids[-1:], len(ids) - 1)
    if "following" in case:
        rows = [logits, *(step(model, cache, [token], len(ids) + i) for i, token in enumerate(case["following"]))]
        return divergence(load_file(case["dense"])["dense"], torch.stack(rows).log_softmax(-1))
    tokens = [int(logits.argmax())]
    while len(tokens) < case["new_tokens"] and tokens[-1] not in case["stop"]:
        tokens.append(int(step(model, cache, tokens[-1:], len(ids) + len(tokens) - 1).argmax()))
    return {"tokens": tokens}


@torch.no_grad()
def replies(model: Any, case: dict[str, Any]) -> Any:
    """Yield the reply of every press of a case."""
    ids, context = case["ids"], case["context"]
    at_prefill = [one for one in case["presses"] if one["press"].split(" ")[0] in BASES]
    every, cache = Every(at_prefill, context), DynamicCache()
    with every(model):
        model(torch.tensor([ids]), past_key_values=cache, logits_to_keep=1)
    dense = [(layer.keys, layer.values) for layer in cache.layers]
    for one in case["presses"]:
        base, _, how = one["press"].partition(" ")
        attended = one["kept"]
        if base == "dense":
            attended, found = len(ids), follow(model, filled(dense, len(ids) - 1), case)
        elif base == "decoding":
            press = DecodingPress(BASES[how](), compression_interval=1, target_size=one["kept"] - 1)
            cache = filled(dense, len(ids) - 2)
            with press(model):
                step(model, cache, ids[-2:-1], len(ids) - 2)  # attends to all, and compresses
                assert cache.get_seq_length() == one["kept"] - 1, f"{one}: {cache.get_seq_length()} tokens are left"
                found = follow(model, cache, case)
        else:
            cache = filled(every.compressed[one["cell"]])
            if how:
                step(model, cache, ids[context:-1], context)
                attended += len(ids) - context
            found = follow(model, cache, case)
        yield {"case": case["key"], "cell": one["cell"], "attended_tokens": attended, **found}


def main() -> None:
    """Answer a job; nothing else is written to the standard output, whatever libraries print."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    disable_progress_bar()  # the caller has one
    job = json.loads(Path(sys.argv[1]).read_text())
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.bfloat16).eval()
    for case in job["cases"]:
        for reply in replies(model, case):
            print(json.dumps(reply), file=out, flush=True)


if __name__ == "__main__":
    main()
