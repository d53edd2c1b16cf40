"""The kernels of a step over coded pages, on a CUDA GPU: `python -m benchmarks.speed.scan`, two minutes.

Shape of Llama-3.1-8B (32 query heads, 8 KV heads, head size 128), bf16, one sequence, random codes. A graph launches one kernel
for each of 20 layers, each with codes of its own, so that nothing stays in the caches; divided by 20. Microseconds of a layer:

    project, scan, rank, attend    of each kernel alone
    all, dependent                 of all in turn, and launched as dependent kernels, as steps do

`--splits 128 192` are numbers of programs of the scan per KV head; `--tokens 131072` alone takes a minute.

`off` is what log weights, their total, and the sums and weights of the estimate differ by from formulas in float64.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spin_hf.kernels import reference_scan
from spin_hf.kernels.compile_ahead import launch_now
from spin_hf.kernels.descriptor_fields import NUM_BINS, LayerField, PlanField, Rating, StepField
from spin_hf.kernels.launch import ATTEND_TOKENS, LaunchShape, LayerBuffers, ScanBuffers, Splits, StepBuffers
from spin_hf.kernels.recipe import KernelRecipe
from spin_hf.kernels.reference_scan import CodedBasis, CodedPages
from spin_hf.kernels.triton_launchers import launchers

HEADS, GROUP, DIM, PAGE, SEGMENT, UNIT = 8, 4, 128, 4, 32, 4
ROWS = 8192
"""Pages per chunk."""
SINKS, RECENT, BUDGET = 1, 17, 512
"""Pages."""
ATTENDING = -(-(SINKS + RECENT + BUDGET) * PAGE // ATTEND_TOKENS)
"""Programs of attention, as `Splits` has them: one for each tile of the list."""
SCALE = DIM**-0.5


class Case:
    """Coded pages of `layers` layers, and the buffers of one step over them."""

    def __init__(self, tokens: int, layers: int, device: str) -> None:
        self.device, self.num_pages = torch.device(device), tokens // PAGE
        self.generator = torch.Generator(device).manual_seed(0)
        segments = self.num_pages // SEGMENT
        self.directory = torch.randperm(segments, generator=self.generator, device=device).int().view(1, -1)
        rows = segments * HEADS * SEGMENT
        self.held: list[Tensor] = [self.directory]
        self.query = self.draw(1, HEADS * GROUP, 1, DIM).bfloat16()
        self.new = self.draw(1, HEADS, 1, DIM).bfloat16(), self.draw(1, HEADS, 1, DIM).bfloat16()
        self.backing = self.draw(min(rows, 1 << 18), PAGE * 2 * DIM).bfloat16()
        self.layers = [self._layer(number, rows) for number in range(layers)]
        self._step()

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    def _table(self, flat: Tensor, per_chunk: int, number: int) -> int:
        """Address of a table of the chunks of `flat`; the last one is repeated up to `number`."""
        chunks = max(1, len(flat) // per_chunk)
        size = flat.stride(0) * flat.element_size() * per_chunk
        table = torch.tensor([flat.data_ptr() + size * min(i, chunks - 1) for i in range(number)], device=self.device)
        self.held += [flat, table]
        return table.data_ptr()

    def _layer(self, number: int, rows: int) -> LayerBuffers:
        device, generator = self.device, self.generator

        def some_bytes(count: int, width: int) -> Tensor:
            return torch.randint(0, 256, (count, width), generator=generator, device=device, dtype=torch.uint8)

        mean = (some_bytes(rows // UNIT, DIM).int() - 128).clamp(min=-127).to(torch.int8)
        unit = torch.rand((rows // UNIT, 1), generator=generator, device=device) * 0.01
        scale, value_scale = (
            (self.draw(rows, PAGE).abs() + 0.2).bfloat16(),
            (self.draw(rows, 1).abs() + 0.2).bfloat16(),
        )
        arrays = (mean, unit, some_bytes(rows, PAGE * DIM // 4), scale, some_bytes(rows, DIM // 4), value_scale)
        quarter, steps = torch.tensor([2.0, 0.8, 0.4, 0.1]), torch.tensor([0.335, 0.996, 0.996, 0.0])
        widths = (quarter * steps).repeat_interleave(DIM // 4).expand(1, HEADS, DIM).to(device)
        inverse = (self.draw(1, HEADS, DIM, DIM) / math.sqrt(DIM)).bfloat16()
        axes = torch.linalg.qr(self.draw(1, HEADS, DIM, DIM)).Q.bfloat16().contiguous()
        origin, value_origin = self.draw(1, HEADS, DIM) * 0.1, self.draw(1, HEADS, DIM)
        vectors = torch.cat([origin, widths, value_origin, widths], -1).contiguous()
        if not number:
            self.first = arrays, CodedBasis(inverse, origin, widths, axes, value_origin, widths, inverse)
        layer = torch.zeros(len(LayerField), dtype=torch.int64)
        chunks = -(-rows // ROWS)
        for name, flat, pages in zip(
            ("SUMMARY_0", "SCALE_0", "SUMMARY_1", "SUMMARY_2", "SUMMARY_3", "SUMMARY_4"), arrays,
            (UNIT, UNIT, 1, 1, 1, 1), strict=True,
        ):  # fmt: skip
            layer[LayerField[name]] = self._table(flat, ROWS // pages, chunks)
        layer[LayerField.BACKING] = self._table(self.backing, ROWS, chunks)
        layer[LayerField.KEY_BASIS], layer[LayerField.VALUE_BASIS] = inverse.data_ptr(), axes.data_ptr()
        layer[LayerField.BASIS_VECTORS] = vectors.data_ptr()
        self.held += [inverse, axes, vectors]
        floors = torch.full((HEADS,), NUM_BINS, dtype=torch.int32, device=device)
        ints = torch.zeros((2, 16), dtype=torch.int64, device=device)
        return LayerBuffers(number, layer.to(device), floors, floors, ints[0].int(), ints[1])

    def _step(self) -> None:
        step, pages, device = torch.zeros(len(StepField), dtype=torch.int64), self.num_pages, self.device
        capacity = max(1024, pages)

        def scratch(field: StepField, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            made = torch.zeros(shape, dtype=dtype, device=device)
            self.held.append(made)
            step[field] = made.data_ptr()
            return made

        self.logits = scratch(StepField.LOGITS, (HEADS, GROUP, capacity), torch.float32)
        scratch(StepField.SCORES, (HEADS, capacity), torch.float32)
        for name in ("BIN_LIST_PAGE", "BIN_LIST_LENGTH", "LIST_PAGE"):
            scratch(StepField[name], (HEADS, capacity), torch.int32)
        scratch(StepField.BIN_LIST_SCORE, (HEADS, capacity), torch.float32)
        scratch(StepField.TIED, (HEADS, capacity), torch.int64)
        scratch(StepField.OUTLIER, (len(self.layers), HEADS, capacity), torch.uint8)
        step[StepField.POSITION], step[StepField.PAGE_CAPACITY] = pages * PAGE - 1, capacity
        step[StepField.LIST_CAPACITY] = capacity
        step[StepField.DIRECTORY], step[StepField.DIRECTORY_STRIDE] = self.directory.data_ptr(), self.directory.shape[1]
        plan = torch.zeros((1, len(PlanField)), dtype=torch.int32)
        plan[:, PlanField.FIRST], plan[:, PlanField.STOP], plan[:, PlanField.NUM_PAGES] = SINKS, pages - RECENT, pages
        plan[:, PlanField.NUM_SELECTED], plan[:, PlanField.CANDIDATES] = BUDGET, pages - RECENT - SINKS
        self.step, self.plan = step.to(device), plan.to(device)
        self.out = torch.zeros((1, HEADS * GROUP, DIM), dtype=torch.bfloat16, device=device)
        compiled = device.type == "cuda"
        self.shape = LaunchShape(
            dtype=torch.bfloat16, quantized=(True, False, False, False, False), num_heads=HEADS, key_dim=DIM, value_dim=DIM,
            page_size=PAGE, page_bytes=PAGE * 2 * DIM * 2, backing_bytes=0, segment_pages=SEGMENT, rows_per_chunk=ROWS,
            padded=False, multiplies_int8=True, shared_memory=(220 if compiled else 48) << 10, compiled=compiled,
        )  # fmt: skip

    def buffers(self, splits: int) -> tuple[StepBuffers, ScanBuffers]:
        """Buffers for so many programs of the scan per KV head, filled with NaN."""
        of_all, empty = Splits(programs=66, score=splits, attend=ATTENDING, dense=ATTENDING, estimate=0), torch.empty(0)
        new = {"device": self.device}
        buffers = StepBuffers(
            splits=of_all, step=self.step, histogram=torch.zeros((HEADS, NUM_BINS), dtype=torch.int32, **new),
            rerank_histogram=empty, zone_edges=torch.zeros(HEADS, dtype=torch.int32, **new),
            list_count=torch.zeros((HEADS, 2), dtype=torch.int32, **new),
            arrivals=torch.zeros(HEADS, dtype=torch.int32, **new),
            stats=torch.full((HEADS, splits * 2 * 16), math.nan, **new),
            split_outputs=torch.full((HEADS, ATTENDING * 2 * GROUP * DIM), math.nan, **new), basis=empty, rotated=empty,
            operands=empty, factors=empty, rerank_stats=empty,
        )  # fmt: skip
        scan = ScanBuffers.allocate(HEADS, GROUP, of_all, DIM, DIM, True, self.device)
        scan.partials.fill_(math.nan)
        return buffers, scan

    def kernels(self, splits: int) -> dict[str, Callable[[LayerBuffers, bool], None]]:
        """Launches of each kernel for a layer, and whether it depends on the one before while that still runs."""
        buffers, scan = self.buffers(splits)
        recipe, plan, query, new = KernelRecipe(Rating.MEAN), self.plan, self.query, self.new

        def shape(overlaps: bool) -> LaunchShape:
            return replace(self.shape, overlaps=overlaps)

        self.scan, self.step_buffers = scan, buffers
        made: dict[str, Callable[[LayerBuffers, bool], None]] = {
            "project": lambda own, overlaps: launchers.project_queries(
                launch_now, buffers, scan, own, query, scale=SCALE, shape=shape(overlaps)
            ),
            "scan": lambda own, overlaps: launchers.scan_pages(
                launch_now, buffers, scan, own, plan, new, group=GROUP, softcap=None, shape=shape(overlaps)
            ),
            "rank": lambda own, overlaps: launchers.rank_pages(
                launch_now, buffers, own, plan, query_index=0, group=GROUP, most_listed=None, recipe=recipe,
                shape=shape(overlaps), scan=scan,
            ),
            "attend": lambda own, overlaps: launchers.attend_pages(
                launch_now, buffers, own, query, self.out, None, query_index=0, num_queries=1, dense=False, scale=SCALE,
                softcap=None, shape=shape(overlaps), scan=scan, plan=plan,
            ),
        }  # fmt: skip
        return made

    def results(self, kernels: dict[str, Callable[[LayerBuffers, bool], None]]) -> dict[str, Tensor]:
        """What the scan of the first layer yields, in float64: log weights, their total, the estimate of all candidates."""
        self.logits.fill_(math.nan)
        kernels["project"](self.layers[0], False)
        kernels["scan"](self.layers[0], False)
        stop = self.num_pages - RECENT
        splits = self.step_buffers.splits.score
        stats = self.step_buffers.stats.flatten()[: HEADS * splits * 2 * 4].view(HEADS, splits, 2, 4).double()
        parts = self.scan.partials.double()
        power = parts[..., -2].amax(1)
        share = (parts[..., -2] - power.unsqueeze(1)).exp2().unsqueeze(-1)
        total = (parts[..., :-2].nan_to_num() * share).sum(1) * (power * math.log(2)).exp().unsqueeze(-1)
        return {
            "logits": self.logits[..., :stop].double(), "total": (stats[:, :, 0] + stats[:, :, 1].log()).logsumexp(1),
            "sums": total, "weight": (parts[..., -1:] * share).sum(1) * (power * math.log(2)).exp().unsqueeze(-1),
        }  # fmt: skip

    def expected(self) -> dict[str, Tensor]:
        """The same by formulas."""
        (mean, unit, codes, scale, value, value_scale), basis = self.first
        pages = torch.arange(self.num_pages, device=self.device)
        rows = self.directory[0].long()[pages // SEGMENT] * HEADS + torch.arange(HEADS, device=self.device)[:, None]
        rows = rows * SEGMENT + pages % SEGMENT
        units = rows[:, ::UNIT] // UNIT
        coded = CodedPages(
            mean[units][None], unit[units][None, ..., 0].double(), codes[rows].unflatten(-1, (PAGE, -1))[None],
            scale[rows][None].double(), value[rows][None], value_scale[rows][None, ..., 0].double(),
        )  # fmt: skip
        query = self.query.squeeze(2).unflatten(1, (HEADS, GROUP)).double()
        stop = self.num_pages - RECENT
        logits = reference_scan.page_log_weights(query, basis, coded, SCALE)[..., :stop]
        weights = logits.exp()
        weights[..., :SINKS] = 0
        kept = CodedPages(*(x[:, :, :stop] if x.shape[2] == self.num_pages else x for x in vars(coded).values()))
        return {
            "logits": logits[0], "total": logits.logsumexp(-1)[0], "sums": reference_scan.coded_sum(weights, kept)[0],
            "weight": weights.sum(-1, keepdim=True)[0],
        }  # fmt: skip


def differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference, of logarithms as it is, of sums relative to the largest one."""
    off = {name: float((found[name] - expected[name]).abs().max()) for name in ("logits", "total")}
    for name in ("sums", "weight"):
        off[name] = float((found[name] - expected[name]).abs().max() / expected[name].abs().max())
    return off


def timed(launches: Callable[[], None], layers: int, repeats: int) -> float:
    """Microseconds per layer of a graph of `launches`, the median."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        launches()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launches()
    took = []
    for _ in range(repeats + 2):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        graph.replay()
        last.record()
        torch.cuda.synchronize()
        took.append(first.elapsed_time(last) * 1e3 / layers)
    return statistics.median(took[2:])


def measure(case: Case, splits: int, repeats: int) -> dict[str, float]:
    """Microseconds per layer of each kernel, and of all of them."""
    kernels, layers = case.kernels(splits), case.layers
    for own in layers:  # what a kernel reads, the one before has written
        for launch in kernels.values():
            launch(own, False)
    row = {}
    for name, launch in kernels.items():
        for before in list(kernels)[: list(kernels).index(name)]:  # what it reads, of one layer for all
            kernels[before](layers[-1], False)
        row[name] = timed(lambda launch=launch: [launch(own, False) for own in layers], len(layers), repeats)
    for name, overlaps in (("all", False), ("dependent", True)):
        row[name] = timed(
            lambda overlaps=overlaps: [launch(own, overlaps) for own in layers for launch in kernels.values()],
            len(layers), repeats,
        )  # fmt: skip
    return row


def main() -> None:
    """Check and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072, 524288])
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--splits", type=int, nargs="+", default=[128], help="programs of the scan per KV head")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.speed.scan: expected a CUDA GPU, found none; run it on a machine with one")
    rows: list[dict[str, Any]] = []
    for tokens in options.tokens:
        case = Case(tokens, options.layers if tokens <= 131072 else min(8, options.layers), "cuda")
        expected = case.expected()
        for splits in options.splits:
            off = differences(case.results(case.kernels(splits)), expected)
            times = measure(case, splits, options.repeats)
            rows.append({"tokens": tokens, "splits": splits, "off": off, **times})
            line = " ".join(f"{name} {us:.1f}" for name, us in times.items())
            errors = " ".join(f"{x:.1e}" for x in off.values())
            print(f"{tokens} tokens, {splits} splits: {line} off {errors}", flush=True)
        del case
        torch.cuda.empty_cache()
    if options.output is not None:
        options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
