"""Write docs/results.md, and the tables of the README, from the results files: `python -m benchmarks.results_page`.

    results/*.json --table functions of the benchmarks--> Section --page()--> docs/results.md
                                                          `readme()` ------> README.md, between its `<!-- ... -->` marks

Every section names its files and what these record: date, GPU, versions, a hash of the package's sources, and the command.
Commands of files that were measured before a script was moved are printed as they are called today.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.common.record import RESULTS, newest
from benchmarks.quality.quality_tables import ruler_table
from benchmarks.results_sections import H200, PARTS, Section, files_like
from benchmarks.results_tables import Lines, Result, day, head, row
from benchmarks.speed.decode_tables import ms

ROOT = RESULTS.parents[1]
PAGE, README = ROOT / "docs" / "results.md", ROOT / "README.md"

COMMANDS = {
    "passkey.json": "make bench",
    "distill-smollm2.json": "python -m spin_hf.distill MODEL --text FILE... --output DIR",
}
"""Of files that do not record theirs."""


def read(name: str) -> Result:
    """The contents of a results file."""
    result: Result = json.loads((RESULTS / name).read_text())
    return result


# What a file records of itself


def command_today(command: str) -> str:
    """A recorded command, calling the module that the script is now."""
    found = re.match(r"python benchmarks/(\w+)\.py", command)
    if found is None:
        return command
    (module,) = RESULTS.parent.glob(f"*/{found[1]}.py")
    return f"python -m benchmarks.{module.parent.name}.{found[1]}{command[found.end() :]}"


def recorded(name: str, result: Result) -> Lines:
    """Where a table comes from: a line that names the file, and one for each command."""
    dates = sorted({day(run) for run in result.get("runs", {})})
    hidden = {"python"} if "kvpress" in json.dumps(result.get("rows", {})) else {"python", "kvpress"}
    versions = [
        f"{library} {number}" for library, number in result.get("versions", {}).items() if library not in hidden
    ]
    about = [*dates, result.get("gpu") or result.get("device", "").upper(), result.get("dtype", ""), *versions]
    about += [f"sources `{result['sources']}`"] if "sources" in result else []
    commands = [run["command"] for run in result.get("runs", {}).values()] or result.get("commands", [])
    commands = commands or [result.get("command") or COMMANDS[Path(name).name]]
    facts = ", ".join(filter(None, about))
    lines = [f"[{name}](../benchmarks/results/{name})" + (f": {facts}" if facts else "")]
    return lines + [f"`{command_today(command)}`" for command in commands]


HEAD = """# Results

`python -m benchmarks.results_page` writes this page from the files in [benchmarks/results](../benchmarks/results).
Below each table stand its files and what they record: date, device, versions, a hash of the package's sources, commands.
Contexts in K are 1,024 tokens. Models of a *shape* have random weights and synthetic keys and values.
`SpinCache(model)` decodes in a CUDA graph, unless a table says *eager*. An empty cell was not measured or does not apply.
A budget is in tokens, or a fraction of the context such as 1/64. `smollm2` is SmolLM2-135M-Instruct, `qwen2.5-0.5b` is
Qwen2.5-Coder-0.5B-Instruct.
"""


def written(section: Section) -> Lines:
    """The lines of a section."""
    results = [read(name) for name in section.files]
    lines = [f"### {section.title}", "", section.caption, ""]
    if section.figure:
        lines += [f"![{section.title.replace('`', '')}](../benchmarks/results/{section.figure})", ""]
    for title, table in section.tables(results):
        lines += ([f"**{title}**", ""] if title else []) + [*table, ""]
    sources = [recorded(name, result) for name, result in zip(section.files, results, strict=True)]
    return lines + [f"- {line}" if i == 0 else f"  {line}" for found in sources for i, line in enumerate(found)] + [""]


def page() -> str:
    """All of docs/results.md."""
    lines = HEAD.splitlines()
    for part, sections in PARTS.items():
        lines += ["", f"## {part}", ""]
        for section in sections:
            lines += written(section)
    return "\n".join(lines).rstrip() + "\n"


# The README's tables


def readme_speed() -> Lines:
    """Milliseconds per token on one H200: `SpinCache(model)`, the fastest method, and what there is besides."""
    ours, earlier, beside, fast = (
        read(f"{H200}-{name}.json")["rows"] for name in ("fitted", "fitted-512k", "bisection", "shadowkv-again")
    )

    def cell(rows: list[dict[str, Any]], **of: Any) -> str:
        found = newest(rows, **of)
        return "" if found is None or not found["tpot_ms"] else ms(found["tpot_ms"])

    lines = head("context", "`SpinCache(model)`", "`shadowkv`", "dense, CUDA graph", "`DynamicCache`")
    for tokens in sorted({entry["tokens"] for entry in earlier}):
        run = ours if cell(ours, tokens=tokens, cache="default") else earlier
        lines.append(row(
            f"{tokens >> 10}K", f"**{cell(run, tokens=tokens, cache='default')}**",
            cell(fast, tokens=tokens, cache="spin", overlap="replayed", gpu_memory="auto"),
            cell(run, tokens=tokens, cache="dense graph"), cell(beside, tokens=tokens, cache="dynamic"),
        ))  # fmt: skip
    return [*lines, "", *readme_batches()]


def readme_batches() -> Lines:
    """Two sentences: many sequences at once, and the longest context."""
    many, long = read("h200/throughput-llama-8b.json"), read("reach-llama-8b.json")
    (best,) = [each for each in many["ratios"] if (each["tokens"], each["rival"]) == (131072, "dense graph")]
    filled = newest(many["rows"], tokens=best["tokens"], cache="spin", batch=best["spin_batch"])
    far = max(long["rows"], key=lambda entry: entry["tokens"])
    assert filled is not None
    return [
        f"{best['spin_batch']} sequences of 128K tokens give {best['spin_tokens_per_s']:.0f} tokens per second with `shadowkv` "
        f"in {many['gpu_memory_gib']:.0f} GiB of that GPU and {filled['cpu_gib']:.0f} GiB of host memory.",
        f"Dense attention in a CUDA graph has room for {best['rival_batch']} of them and gives "
        f"{best['rival_tokens_per_s']:.0f}. One sequence of {far['tokens'] >> 10}K tokens takes {ms(far['tpot_ms'])} ms",
        f"per token on an H100 with `shadowkv`, {far['in_all_gib']:.1f} GiB of GPU memory, weights included, and "
        f"{far['cpu_gib']:.0f} GiB of host memory.",
    ]


README_RULER = ("dense", "fitted, 1/16", "fitted, 1/64", "shadowkv, 1/64")
"""The rows of the README's table of RULER."""


def readme_ruler() -> Lines:
    """RULER's score by length."""
    results = [read(name) for name in files_like("ruler-*.json")]
    cells = {cell for result in results for row in result["rows"].values() for cell in row}
    return ruler_table(results, [cell for cell in README_RULER if cell in cells])


def readme(text: str) -> str:
    """A README with its tables written anew.

    Raises:
        ValueError: a mark is missing.
    """
    tables = {"speed": readme_speed, "ruler": readme_ruler}
    for name, table in tables.items():
        start, stop = f"<!-- {name}: benchmarks/results_page.py -->\n", f"<!-- end of {name} -->\n"
        before, begun, rest = text.partition(start)
        _, ended, after = rest.partition(stop)
        if not begun or not ended:
            raise ValueError(
                f"README.md: expected the marks {start.strip()} and {stop.strip()}, found only one or none"
            )
        text = before + start + "\n".join(table()) + "\n" + stop + after
    return text


def main() -> None:
    """Write both."""
    PAGE.write_text(page())
    README.write_text(readme(README.read_text()))


if __name__ == "__main__":
    main()
