"""Reads JSON that may be hostile: limited size, no duplicate or unknown names, exact types, bounds."""

from __future__ import annotations

import json
from typing import Any

from ..attention.methods.json_checks import is_no_deeper, unique
from ..config import shown

_MOST_DEPTH = 16


class RefusedError(Exception):
    """A saved cache that is not accepted. Arguments: what was expected, what was found, and optionally a remedy."""


def parse(text: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        RefusedError: it is no JSON object, or it is nested too deeply.
    """
    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise RefusedError("JSON", f"{type(error).__name__} ({shown(str(error))})") from error
    if not isinstance(found, dict) or not is_no_deeper(found, _MOST_DEPTH):
        raise RefusedError(f"a JSON object that is at most {_MOST_DEPTH} deep", shown(found, 80))
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


class Fields:
    """The fields of a JSON object, each read once. `done` refuses the rest.

    Args:
        given: the object.
        where: its place, for messages.
    """

    def __init__(self, given: Any, where: str) -> None:
        if not isinstance(given, dict):
            raise RefusedError(f"an object as {where}", shown(given, 80))
        self._left, self.where = dict(given), where

    def take(self, name: str, *kinds: type) -> Any:
        """The field `name`, whose type is exactly one of `kinds`."""
        if name not in self._left:
            raise RefusedError(f"{name!r} in {self.where}", "none")
        value = self._left.pop(name)
        if type(value) not in kinds:
            names = " or ".join(kind.__name__ for kind in kinds)
            raise RefusedError(f"{name!r} in {self.where} as {names}", shown(value, 80))
        return value

    def count(self, name: str, most: int, least: int = 0) -> int:
        """An int from `least` to `most`."""
        value: int = self.take(name, int)
        if not least <= value <= most:
            raise RefusedError(f"{name!r} in {self.where} from {least} to {most}", shown(value, 80))
        return value

    def flag(self, name: str) -> bool:
        """A bool."""
        return bool(self.take(name, bool))

    def text(self, name: str, most: int = 200) -> str:
        """A text of at most `most` characters."""
        value: str = self.take(name, str)
        if len(value) > most:
            raise RefusedError(f"{name!r} in {self.where} of at most {most} characters", f"{len(value)}")
        return value

    def hexadecimal(self, name: str, digits: int) -> str:
        """A text of `digits` hexadecimal digits."""
        value = self.text(name)
        if len(value) != digits or set(value) - set("0123456789abcdef"):
            raise RefusedError(f"{digits} hexadecimal digits as {name!r} in {self.where}", shown(value, 80))
        return value

    def counts(self, name: str, most: int, longest: int) -> list[int]:
        """A list of at most `longest` ints from 0 to `most`."""
        value: list[int] = self.take(name, list)
        if len(value) > longest or not all(type(number) is int and 0 <= number <= most for number in value):
            raise RefusedError(
                f"{name!r} in {self.where} as at most {longest} numbers from 0 to {most}", shown(value, 80)
            )
        return value

    def done(self) -> None:
        """Refuse fields that were not read."""
        if self._left:
            raise RefusedError(f"no other fields in {self.where}", shown(sorted(self._left), 80))
