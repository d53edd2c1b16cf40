"""Draws what a loop did over time, from its events: requests per step, the queue, and tokens per second.

    RequestLoop(model, events="events.jsonl")      then
    python examples/draw_requests.py events.jsonl --output requests.svg

Writes an SVG file; needs nothing but Python and spin_hf.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from spin_hf.serving.events import Event, StepDone, read_events

WIDTH, HEIGHT, LEFT, GAP = 760, 150, 70, 46
Points = list[tuple[float, float]]


def panels(events: Sequence[Event], parts: int = 120) -> dict[str, Points]:
    """Title -> (seconds, value): rows and queue of each step, and tokens per second in each of `parts` parts of the time."""
    steps = [event for event in events if isinstance(event, StepDone)]
    if not steps:
        raise SystemExit(
            "draw_requests: expected events of steps, found none; pass events of a loop that has generated"
        )
    end = max(step.time for step in steps)
    width = end / parts
    counts = [0] * parts
    for step in steps:
        counts[min(parts - 1, int(step.time / width))] += step.rows
    return {
        "requests per step": [(step.time, step.rows) for step in steps],
        "requests waiting": [(step.time, step.waiting) for step in steps],
        "tokens per second": [((part + 0.5) * width, count / width) for part, count in enumerate(counts)],
    }


def drawn(title: str, points: Points, top: float, end: float) -> str:
    """One panel as SVG."""
    most = max(1.0, *(value for _, value in points))
    path = " ".join(
        f"{LEFT + x / end * (WIDTH - LEFT - 20):.1f},{top + HEIGHT - y / most * HEIGHT:.1f}" for x, y in points
    )
    return (
        f'<text x="{LEFT}" y="{top - 8}">{title}</text>'
        f'<text x="{LEFT - 8}" y="{top + 10}" text-anchor="end">{most:,.0f}</text>'
        f'<text x="{LEFT - 8}" y="{top + HEIGHT}" text-anchor="end">0</text>'
        f'<path d="M{LEFT},{top}V{top + HEIGHT}H{WIDTH - 20}" fill="none" stroke="#999"/>'
        f'<polyline points="{path}" fill="none" stroke="#1f6feb" stroke-width="1.5"/>'
    )


def svg(events: Sequence[Event]) -> str:
    """The whole drawing."""
    made = panels(events)
    end = max(x for points in made.values() for x, _ in points)
    parts = [
        drawn(title, points, 30 + number * (HEIGHT + GAP), end) for number, (title, points) in enumerate(made.items())
    ]
    height = 30 + len(made) * (HEIGHT + GAP)
    foot = f'<text x="{WIDTH - 20}" y="{height - 14}" text-anchor="end">{end:,.1f} s</text>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="12">'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(parts)}{foot}</svg>\n'
    )


def main() -> None:
    """Read a file of events and write the drawing."""
    parser = argparse.ArgumentParser(description="draw what a loop did")
    parser.add_argument("events", type=Path, help="the file that RequestLoop(events=...) wrote")
    parser.add_argument("--output", type=Path, default=Path("requests.svg"))
    args = parser.parse_args()
    args.output.write_text(svg(read_events(args.events.read_text().splitlines())))
    print(args.output)


if __name__ == "__main__":
    main()
