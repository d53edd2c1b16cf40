"""What every error message must say."""

from __future__ import annotations

REMEDIES = ("pass ", "raise ", "lower ", "use ", "call ", "make ", "train ")


def check_message(error: BaseException, *facts: str) -> None:
    """The message names `facts` and a remedy."""
    text = str(error)
    for fact in facts:
        assert fact in text, f"{fact!r} is missing in: {text}"
    assert any(verb in text for verb in REMEDIES), f"no remedy in: {text}"
