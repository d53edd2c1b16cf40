"""What a run records, and when two runs count as equal.

    Trace: tokens  [(label, ids [rows, n])]            exact
           logits  [(label, floats [rows, vocab])]     within 1e-4 of the largest logit of that entry

Every entry has a label (`turn 2 step 5`), so that a failure says where two runs diverge. Positions of padding are
left out before: attention of a padded query is undefined.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

RELATIVE_TOLERANCE = 1e-4


@dataclass
class Trace:
    """Tokens and logits of one run, in the order in which they were made."""

    tokens: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    logits: list[tuple[str, torch.Tensor]] = field(default_factory=list)

    def add_tokens(self, label: str, ids: torch.Tensor) -> None:
        self.tokens.append((label, ids.clone()))

    def add_logits(self, label: str, logits: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        """Record logits [rows, vocab] or [rows, n, vocab]; `valid` [rows, n] keeps only these positions."""
        logits = logits.detach().float()
        logits = logits[valid.bool()] if valid is not None else logits.reshape(-1, logits.shape[-1])
        self.logits.append((label, logits.clone()))

    def add_generated(self, label: str, output: object) -> None:
        """Record what `generate(return_dict_in_generate=True, output_logits=True)` returned."""
        self.add_tokens(label, output.sequences)  # type: ignore[attr-defined]
        for step, logits in enumerate(output.logits):  # type: ignore[attr-defined]
            self.add_logits(f"{label} step {step}", logits)
        scores = getattr(output, "sequences_scores", None)
        if scores is not None:
            self.add_logits(f"{label} sequence scores", scores[None])


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest deviation, relative to the largest logit expected; inf where anything is not finite."""
    if not bool(torch.isfinite(actual).all()):
        return float("inf")
    return float((actual - expected).abs().max() / expected.abs().max())


def assert_same(actual: Trace, expected: Trace, tolerance: float = RELATIVE_TOLERANCE) -> None:
    """Fail at the first entry in which `actual` leaves `expected`, saying how far the logits were off by then."""
    assert [label for label, _ in actual.logits] == [label for label, _ in expected.logits]
    assert expected.logits, "a mode must record logits"
    worst = 0.0
    for (label, ours), (_, theirs) in zip(actual.logits, expected.logits, strict=True):
        assert ours.shape == theirs.shape, (
            f"{label}: logits have shape {tuple(ours.shape)}, expected {tuple(theirs.shape)}"
        )
        rows_off = [row for row in range(len(theirs)) if not difference(ours[row], theirs[row]) <= tolerance]
        off = difference(ours, theirs)
        assert off <= tolerance, (
            f"{label}: logits are {off:.1e} of the largest away, {tolerance:.0e} allowed "
            f"(rows {rows_off} of {len(theirs)}; worst before: {worst:.1e})"
        )
        worst = max(worst, off)
    for (label, ours), (_, theirs) in zip(actual.tokens, expected.tokens, strict=True):
        assert torch.equal(ours, theirs), (
            f"{label}: tokens differ\n  ours   {ours.tolist()}\n  theirs {theirs.tolist()}"
        )


def assert_identical(actual: Trace, expected: Trace) -> None:
    """Fail unless both runs agree bit for bit."""
    for ours, theirs in ((actual.tokens, expected.tokens), (actual.logits, expected.logits)):
        for (label, a), (_, b) in zip(ours, theirs, strict=True):
            assert torch.equal(a, b), f"{label}: not identical, off by {(a.float() - b.float()).abs().max():.1e}"
