"""The package is a command: `python -m spin_hf.distill`."""

from __future__ import annotations

import runpy

import pytest


def test_python_runs_the_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["distill", "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("spin_hf.distill", run_name="__main__")
    assert stopped.value.code == 0
    assert "usage: python -m spin_hf.distill" in capsys.readouterr().out
