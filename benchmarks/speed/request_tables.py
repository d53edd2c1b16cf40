"""Tables of the rows of `requests.py`: each load's systems, and the comparison with the targets."""

from __future__ import annotations

from typing import Any

from benchmarks.common.record import newest
from benchmarks.speed.batch_tables import head
from benchmarks.speed.decode_tables import row
from benchmarks.speed.request_loads import LOADS

Result = dict[str, Any]
Lines = list[str]

SYSTEMS = {
    "spin loop": "`RequestLoop`", "spin static": "`SpinCache`, static batches", "dense static": "dense, static batches",
    "dense joining": "dense, requests join and leave", "transformers": "transformers' `generate_batch`",
}  # fmt: skip
COLUMNS = {
    "tokens/s": "tokens_per_s", "decode tokens/s": "full_tokens_per_s", "TTFT p50, s": "ttft_p50_s",
    "TTFT p95, s": "ttft_p95_s", "TPOT p50, ms": "tpot_p50_ms", "requests ended": "requests", "seconds": "seconds",
}  # fmt: skip


def tables(result: Result) -> list[tuple[str, Lines]]:
    """A table of each load that was measured, with a title, and that of the targets."""
    made = []
    for load in LOADS:
        rows = {name: newest(result["rows"], load=load, cache=name) for name in SYSTEMS}
        lines = head("system", *COLUMNS)
        for name, found in rows.items():
            failed = newest(result["rows"], cache=f"{load} {name}")
            if found is None and failed is not None:
                why = "out of memory" if "memory" in str(failed.get("why", failed.get("failed"))) else "failed"
                lines.append(row(SYSTEMS[name], why, *[""] * (len(COLUMNS) - 1)))
            if found is not None and "tokens_per_s" in found:
                attention = f", {found['attention']}" if "attention" in found else ""
                lines.append(row(f"{SYSTEMS[name]}{attention}", *(_shown(found.get(key)) for key in COLUMNS.values())))
        if len(lines) > 2:
            scale = next((found["scale"] for found in rows.values() if found is not None), 1)
            made.append((f"`{load}`" + (f", {scale:g} of its requests" if scale != 1 else ""), lines))
    if result.get("targets"):
        made.append(("Compared", targets(result["targets"])))
    return made


def targets(entries: list[dict[str, Any]]) -> Lines:
    """How many times better `RequestLoop` is, beside the target."""
    return head("load", "over", "figure", "times better", "target") + [
        row(
            f"`{each['load']}`",
            SYSTEMS[each["rival"]],
            f"`{each['figure']}`",
            f"{each['ratio']:g}",
            f"{each['target']:g}",
        )
        for each in entries
    ]


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:,}"
