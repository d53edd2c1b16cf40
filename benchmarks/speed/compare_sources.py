"""Two versions of the package, measured one after the other on one machine: `python -m benchmarks.speed.compare_sources A B`.

A and B are folders that `benchmarks.speed.decode --output` of either version wrote. Writes their times per token of the same
row side by side to `benchmarks/results/compare-sources.json` (`--output`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.common.record import RESULTS

SAME = ("shape", "dtype", "budget_tokens", "batch", "gpu", "versions")
"""What both sides must have in common."""


def compared(before: dict[str, Any], after: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows that both results have, with both times."""
    differing = [name for name in SAME if before.get(name) != after.get(name)]
    if differing:
        raise SystemExit(
            f"compare_sources: expected two runs on one machine with the same versions, got other {differing}"
        )
    times = {(row["tokens"], row["cache"], row.get("gpu_memory")): row.get("tpot_ms") for row in before["rows"]}
    rows = []
    for row in after["rows"]:
        old, new = times.get((row["tokens"], row["cache"], row.get("gpu_memory"))), row.get("tpot_ms")
        if old is not None and new is not None:
            rows.append(
                {
                    "method": after["method"], "tokens": row["tokens"], "before_ms": old, "after_ms": new,
                    "ratio": round(new / old, 4),
                }
            )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--output", type=Path, default=RESULTS / "compare-sources.json")
    args = parser.parse_args()
    result: dict[str, Any] = {"rows": []}
    for file in sorted(args.after.glob("decode-*.json")):
        before, after = (json.loads((folder / file.name).read_text()) for folder in (args.before, args.after))
        result |= {name: after[name] for name in SAME}
        result |= {"sources_before": before["sources"], "sources": after["sources"], "runs": after["runs"]}
        result["rows"] += compared(before, after)
    for row in result["rows"]:
        print(row)
    args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
