"""Rows of `several_gpus.py`, measured by one process of a way; with tensor parallelism all ranks run this together.

    spin           SpinCache(model), captured steps under `generate`      dynamic       DynamicCache under `generate`
    dense graph    flash decoding over all tokens in a CUDA graph captured by hand
    spin prefill, dynamic prefill    seconds of a prompt of random tokens, to the first token
    spin batch, dense batch          as many sequences as fit the GPUs: milliseconds per step, tokens a second

Ranks do the same work in the same order: numbers of repeats are fixed, and batches follow from the smallest free memory.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig
from transformers.cache_utils import Cache
from transformers.distributed import DistributedConfig
from transformers.initialization import no_init_weights

from benchmarks.common.shapes import SHAPES, fill_spin, head_dim, states
from benchmarks.common.timing import failure, free, tpot, wait_for_device
from spin_hf import SpinCache

SEVERAL_GPU_SHAPES: dict[str, Any] = {
    "llama-8b": SHAPES["llama-8b"],
    "llama-70b": LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, max_position_embeddings=1 << 20, dtype=torch.bfloat16,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    ),
    "tiny": LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=1 << 20, dtype=torch.float32,
    ),
}  # fmt: skip
ROWS = ("spin", "dense graph", "dynamic", "spin prefill", "dynamic prefill", "spin batch", "dense batch")
_STD, _FAINT_STD = 0.02, 4e-5
_GRAPH_REPLAYS = 60


class Bench:
    """What rows are measured with.

    Args:
        given: the command line.
        way: "tp", "one" or "map".
        size: ranks.
    """

    def __init__(self, given: argparse.Namespace, way: str, size: int) -> None:
        self.given, self.way, self.size = given, way, size
        self.config = copy.deepcopy(SEVERAL_GPU_SHAPES[given.shape])
        self.config._attn_implementation = "sdpa"
        self.model = model_of(self.config, way, size, given.device, given.gpus)
        self.local = copy.copy(self.config)
        """The config with the heads of one rank."""
        self.local.head_dim = head_dim(self.config)
        self.local.num_key_value_heads = self.config.num_key_value_heads // size
        self.layer_devices = [
            next(iter(layer.parameters())).device for layer in self.model.model.layers
        ]  # several with a device map

    def batch_of(self, tokens: int) -> int:
        """As many sequences as have their keys and values in six tenths of the memory that is free on every GPU.

        Summaries of pages, and the margin that a cache leaves free, take the rest.
        """
        per_layer = tokens * self.local.num_key_value_heads * 2 * self.local.head_dim * self.config.dtype.itemsize
        of_layers = {device: per_layer * self.layer_devices.count(device) for device in self.layer_devices}
        gpus = [device for device in of_layers if device.type == "cuda"]
        fits = min((int(0.6 * torch.cuda.mem_get_info(gpu)[0]) // of_layers[gpu] for gpu in gpus), default=4)
        if self.size > 1:
            smallest = torch.tensor([fits], device=self.model.device)
            dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
            fits = int(smallest)
        return max(1, fits)

    def spin(self, tokens: int, batch: int = 1) -> SpinCache:
        """A filled SpinCache."""
        cache = SpinCache(self.model, budget=self.given.budget)
        fill_spin(cache, self.local, tokens, self.given.device, batch)
        return cache

    def row(self, name: str, tokens: int) -> dict[str, Any]:
        """One row."""
        if name.startswith("dense") and (self.way == "map" or self.given.device == "cpu"):
            return {"tpot_ms": None, "why": "a graph is captured by hand on one GPU, or on one for each rank"}
        short = self.given.device == "cpu"
        few, many = (2, 4) if short else (8, 72)
        if name == "spin":
            cache = self.spin(tokens)
            made = tpot(self.model, cache, tokens, few=few, many=many, times=1 if short else 3)
            return {**made, "captured": graphs(cache), "gpu_gib": round(cache.stats().gpu_bytes / 2**30, 3)}
        if name == "dynamic":
            cache = DynamicCache(config=self.config)
            for index, device in enumerate(self.layer_devices):
                cache.update(*states(self.local, tokens, str(device)), index)
            return tpot(self.model, cache, tokens, few=few, many=few + 2 if short else 24, times=1 if short else 2)
        if name.endswith("prefill"):
            return {"seconds": self.prefill(name, tokens)}
        batch = self.batch_of(tokens) if name.endswith("batch") else 1
        if name == "spin batch":
            cache, many = self.spin(tokens, batch), 4 if short else 24
            made = tpot(self.model, cache, tokens, few=few, many=many, times=1, batch=batch)
        else:
            made = self.dense_graph(tokens, batch)
        rate = {"batch": batch, "tokens_per_s": round(batch / made["tpot_ms"] * 1e3, 1)} if "batch" in name else {}
        return {**made, **rate}

    def prefill(self, name: str, tokens: int) -> float:
        """Seconds to the first token of a prompt; the second of two calls."""
        ids = torch.randint(self.config.vocab_size, (1, tokens), device=self.model.device)
        took = 0.0
        for count in (min(tokens, 2048), tokens):
            free()
            make: Callable[[], Cache] = (
                (lambda: SpinCache(self.model, budget=self.given.budget))
                if name.startswith("spin")
                else (lambda: DynamicCache(config=self.config))
            )
            wait_for_device()
            started = time.perf_counter()
            part = ids[:, :count]
            self.model.generate(
                part, attention_mask=torch.ones_like(part), past_key_values=make(), max_new_tokens=1, do_sample=False
            )
            wait_for_device()
            took = time.perf_counter() - started
        return round(took, 4)

    def dense_graph(self, tokens: int, batch: int) -> dict[str, Any]:
        """Milliseconds of a step in a graph."""
        from benchmarks.speed.dense_graph import DenseLayer, in_graph

        layers = [DenseLayer(*states(self.local, tokens, batch=batch)) for _ in range(self.config.num_hidden_layers)]
        return in_graph(self.model, Cache(layers=layers), tokens, True, batch, bench=replay_ms)


def replay_ms(replay: Callable[[], None]) -> float:
    """Milliseconds of a replay, the same number of replays on all ranks."""
    for _ in range(5):
        replay()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(_GRAPH_REPLAYS):
        replay()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / _GRAPH_REPLAYS


def graphs(cache: SpinCache) -> int:
    """Steps of a cache that were captured."""
    steps = cache.calls.steps
    return sum(step is not None for step in steps.captured.values()) if steps else 0


@torch.no_grad()
def model_of(config: Any, way: str, size: int, device: str, gpus: int) -> Any:
    """A model with random weights, distributed as the way says."""
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    places = [torch.device(device, index) if device == "cuda" else torch.device("cpu") for index in range(gpus)]
    own = places[dist.get_rank()] if way == "tp" else places[0]
    if way == "tp":
        distributed, _, mesh = type(model).prepare_distribute_model(DistributedConfig(tp_size=size))
        model = type(model).maybe_distribute_model(model, distributed, mesh)
    layers = len(model.model.layers)
    number = {layer: index * gpus // layers for index, layer in enumerate(model.model.layers)}
    devices = {module: places[number[layer]] for layer in number for module in layer.modules()} if way == "map" else {}
    last = {model.lm_head, model.model.norm}
    generator = {place: torch.Generator(place).manual_seed(0) for place in {*places, own}}
    for module_name, module in model.named_modules():
        target = devices.get(module, places[-1] if way == "map" and module in last else own)
        for name, parameter in list(module.named_parameters(recurse=False)):
            shape = parameter.to_local().shape if isinstance(parameter, DTensor) else parameter.shape
            local = torch.empty(shape, dtype=parameter.dtype, device=target)
            if local.dim() == 1:
                local.fill_(1)
            else:
                faint = module_name.endswith(("o_proj", "down_proj"))
                local.normal_(0, _FAINT_STD if faint else _STD, generator=generator[target])
            held: Any = local
            if isinstance(parameter, DTensor):
                held = DTensor.from_local(
                    local, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape,
                    stride=parameter.stride(),
                )  # fmt: skip
            setattr(module, name, torch.nn.Parameter(held, requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(own)
    if way == "map":
        model = _dispatched(
            model, {index: number[layer] for index, layer in enumerate(model.model.layers)}, gpus, device
        )
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model.eval()


def _dispatched(model: Any, layers: dict[int, int], gpus: int, device: str) -> Any:
    """A model with accelerate's hooks, whose layers are on several GPUs."""
    from accelerate import dispatch_model

    if device == "cpu":
        return model
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": gpus - 1, "lm_head": gpus - 1}
    return dispatch_model(model, {**places, **{f"model.layers.{index}": gpu for index, gpu in layers.items()}})


def run_way(given: argparse.Namespace, way: str, rank: int, size: int, rows: str, seconds: float) -> None:
    """Measure the rows of a way until its time is over. Rank 0 writes them, one JSON a line.

    Args:
        rows: the file.
        seconds: that are left.
    """
    end = time.monotonic() + seconds
    if given.device == "cuda":
        torch.cuda.set_device(rank)
    if way == "tp":
        dist.init_process_group("nccl" if given.device == "cuda" else "gloo")
    try:
        bench = Bench(given, way, size)
    except torch.cuda.OutOfMemoryError as error:
        if way == "tp":
            raise
        _add(rows, {"way": way, "tokens": 0, "row": "model", **failure(error)})
        return
    for name in given.rows:  # the most important ones first
        for tokens in given.tokens:
            if _is_over(end, bench):
                return
            torch.manual_seed(1)
            started = time.monotonic()
            try:
                made = bench.row(name, tokens)
            except Exception as error:
                if way == "tp":  # the other ranks may wait for this one
                    raise
                made = failure(error)
            free()
            if not rank:
                took = round(time.monotonic() - started, 1)
                _add(rows, {"way": way, "tokens": tokens, "row": name, **made, "took_s": took})
    if way == "tp":
        dist.destroy_process_group()


def _add(rows: str, row: dict[str, Any]) -> None:
    """Add a row to the file."""
    print(json.dumps(row), flush=True)
    with open(rows, "a") as file:
        file.write(json.dumps(row) + "\n")


def _is_over(end: float, bench: Bench) -> bool:
    """Whether the time is over, on any rank."""
    over = torch.tensor([int(time.monotonic() > end)], device=bench.model.device)
    if bench.size > 1:
        dist.all_reduce(over, op=dist.ReduceOp.MAX)
    return bool(over)
