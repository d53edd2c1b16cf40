"""Tables of the results of `quality.py`, `retrieval.py` and `answer_prompts.py`, and one of all:
`python -m benchmarks.quality.quality_tables [file ...]`.

Rows of a method at a budget are averaged over texts or examples; a mean is only printed where all methods have the same ones.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.common.record import RESULTS
from benchmarks.quality.tasks import TASKS

Lines = dict[str, dict[int, float]]
"""By method, a value for each share."""


def of_texts(rows: dict[str, Any], value: str) -> dict[tuple[str, int], dict[str, float]]:
    """From rows named `method, 1/share, text`: for each method and share the value of every text that has one."""
    found: dict[tuple[str, int], dict[str, float]] = {}
    for name, row in rows.items():
        method, share, text = name.split(", ")
        values = found.setdefault((method, int(share.removeprefix("1/"))), {})
        if value in row:
            values[text] = row[value]
    return found


def of_tasks(rows: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """From examples named `task, index`: for each cell and task the scores of its examples."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, cells in rows.items():
        task, index = name.rsplit(", ", 1)
        for cell, entry in cells.items():
            found.setdefault(cell, {}).setdefault(task, {})[index] = entry["score"]
    return found


def kl_table(rows: dict[str, Any]) -> list[str]:
    """KL, and mass as a share of the oracle's where it is known, by method and budget."""
    kl, mass = of_texts(rows, "kl"), of_texts(rows, "of_oracle")
    texts = set().union(*(values for values in kl.values()))
    shares = sorted({share for _, share in kl}, reverse=True)
    lines = ["| budget | " + " | ".join(f"1/{share}" for share in shares) + " |", "| --- " * (len(shares) + 1) + "|"]
    for method in dict.fromkeys(method for method, _ in kl):
        entries = []
        for share in shares:
            values, of_oracle = kl.get((method, share), {}), mass.get((method, share), {})
            entry = f"{fmean(values.values()):.3f}" if set(values) == texts else ""
            entries.append(entry + (f", {fmean(of_oracle.values()):.1%}" if entry and set(of_oracle) == texts else ""))
        lines.append(f"| {method} | " + " | ".join(entries) + " |")
    return lines


def task_means(rows: dict[str, Any]) -> dict[str, dict[str, float]]:
    """For each cell that has all examples, the mean score of every task, and of all tasks as `mean`."""
    found = of_tasks(rows)
    asked = found.get("dense", {})
    tasks = [task for task in TASKS if task in asked] + [task for task in asked if task not in TASKS]
    means = {}
    for cell, scores in found.items():
        if all(set(scores.get(task, {})) == set(found["dense"][task]) for task in tasks):
            of_task = {task: fmean(scores[task].values()) for task in tasks}
            means[cell] = {**of_task, "mean": fmean(of_task.values())}
    return means


def task_table(rows: dict[str, Any]) -> list[str]:
    """The mean score of the answers, by cell and task."""
    means = task_means(rows)
    names = list(means["dense"]) if "dense" in means else []
    lines = ["| budget | " + " | ".join(names) + " |", "| --- " * (len(names) + 1) + "|"]
    order = ["dense", *sorted((cell for cell in means if cell != "dense"), key=_order)]
    lines += [
        f"| {cell} | " + " | ".join(f"{means[cell][name]:.0%}" for name in names) + " |" for cell in order if names
    ]
    return lines


def kl_lines(rows: dict[str, Any]) -> Lines:
    """KL by method and share, of those with all texts."""
    found = of_texts(rows, "kl")
    texts = set().union(*(values for values in found.values()))
    lines: Lines = {}
    for (method, share), values in found.items():
        if set(values) == texts:
            lines.setdefault(method, {})[share] = fmean(values.values())
    return lines


def score_lines(rows: dict[str, Any]) -> Lines:
    """The mean score over tasks by method and share; of `dense`, share 1."""
    lines: Lines = {}
    for cell, means in task_means(rows).items():
        method, _, share = cell.partition(", 1/")
        lines.setdefault(method, {})[int(share or 1)] = means["mean"]
    return lines


def summary(results: list[dict[str, Any]], shares: tuple[int, ...] = (64, 16)) -> list[str]:
    """One table of all: a method a row, KL or the mean score at some budgets of every result a column."""
    answers = ["new_tokens" in result for result in results]
    lines = [(score_lines if asked else kl_lines)(r["rows"]) for r, asked in zip(results, answers, strict=True)]
    titles = [f"{'answered' if asked else 'KL'}, {r['model']}" for r, asked in zip(results, answers, strict=True)]
    heads = [f"{title}: 1/{share}" for title in titles for share in shares]
    table = ["| | " + " | ".join(heads) + " |", "| --- " * (len(heads) + 1) + "|"]
    methods = dict.fromkeys(method for found in lines for method in found)
    for method in sorted(methods, key=lambda method: method != "dense"):
        cells = []
        for found, asked in zip(lines, answers, strict=True):
            values = found.get(method, {})
            for share in shares:
                value = values.get(1 if method == "dense" else share)
                cells.append("" if value is None else f"{value:.0%}" if asked else f"{value:.3f}")
        table.append(f"| {method} | " + " | ".join(cells) + " |")
    return table


def found_results() -> dict[Path, dict[str, Any]]:
    """The results files that there are, by their names."""
    kinds = ("quality", "retrieval", "ruler", "records", "documents")
    files = sorted(file for kind in kinds for file in RESULTS.rglob(f"{kind}-*.json"))
    return {file: json.loads(file.read_text()) for file in files}


def has_rivals(result: dict[str, Any]) -> bool:
    """Whether a result has rows of kvpress."""
    rows = result["rows"]
    return any("kvpress" in name for name in ([cell for row in rows.values() for cell in row] + list(rows)))


def ruler_table(results: list[dict[str, Any]], of_cells: Sequence[str] = ()) -> list[str]:
    """RULER's score, the mean of its tasks in per cent, by model and length: a cell a row.

    Args:
        results: contents of results files.
        of_cells: the cells shown; all if empty.
    """
    means = [task_means(result["rows"]) for result in results]
    titles = [f"{result['model']}, {result['tokens'] >> 10}K" for result in results]
    lines = ["| budget | " + " | ".join(titles) + " |", "| --- " * (len(titles) + 1) + "|"]
    found = dict.fromkeys(cell for of_result in means for cell in of_result)
    for cell in of_cells or ["dense", *sorted((cell for cell in found if cell != "dense"), key=_order)]:
        shown = [f"{100 * of_result[cell]['mean']:.1f}" if cell in of_result else "" for of_result in means]
        lines.append(f"| {cell} | " + " | ".join(shown) + " |")
    return lines


def _order(cell: str) -> tuple[bool, str, int]:
    method, share = cell.split(", 1/")
    return method.startswith("kvpress"), method, -int(share)


def main() -> None:
    """Print the table of every results file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, nargs="*")
    files = parser.parse_args().results
    results = {file: json.loads(file.read_text()) for file in files} or found_results()
    print("\n".join(summary([result for result in results.values() if has_rivals(result)])))
    for file, result in results.items():
        about = f"{file.stem}: {result['tokens']:,} tokens, {len(result['rows'])} rows"
        table = task_table if "new_tokens" in result else kl_table
        print(f"\n{about}\n\n" + "\n".join(table(result["rows"])))


if __name__ == "__main__":
    main()


def sparse_prefill_table(result: dict[str, Any]) -> list[str]:
    """Rows of `sparse_prefill.py`: KL and density of every way, or mean scores of questions."""
    if "new_tokens" in result:
        scores: dict[str, dict[str, list[float]]] = {}
        densities: dict[str, list[float]] = {}
        for name, entry in result["rows"].items():
            example, cell = name.split(": ")
            scores.setdefault(cell, {}).setdefault(example.split(",")[0], []).append(entry["score"])
            densities.setdefault(cell, []).append(entry["density"])
        tasks = list(dict.fromkeys(task for by_task in scores.values() for task in by_task))
        lines = ["| blocks | density | " + " | ".join(tasks) + " |", "|---" * (len(tasks) + 2) + "|"]
        for cell, by_task in scores.items():
            found = [by_task.get(task, []) for task in tasks]
            means = [f"{sum(given) / len(given):.2f} ({len(given)})" if given else "" for given in found]
            density = sum(densities[cell]) / len(densities[cell])
            lines.append(f"| {cell} | {100 * density:.1f} % | " + " | ".join(means) + " |")
        return lines
    lines = ["| way | rule | per | parameter | density | KL | same best token | lost mass |", "|---" * 8 + "|"]
    for name, entry in result["rows"].items():
        way, rule, per = name.split(",")[0].split(" at ")[0].split("/")
        lost = "" if entry["lost_mass"] is None else f"{100 * entry['lost_mass']:.1f} %"
        head = "| all | | | |" if way == "all" else f"| {way} | {rule} | {per} | {entry['parameter']:.3g} |"
        lines.append(
            f"{head} {100 * entry['density']:.1f} % | {entry['kl']:.4f} | {100 * entry['top1_agrees']:.0f} % | {lost} |"
        )
    return lines
