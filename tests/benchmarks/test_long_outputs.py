"""A text is decoded token by token: rows say how far its steps are from dense attention, and how long they took."""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentTypeError, Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, LlamaForCausalLM

from benchmarks.common.rows_file import Rows
from benchmarks.quality import long_outputs
from benchmarks.quality.long_outputs import (
    Cell,
    Steps,
    Text,
    budget_of,
    cells_of,
    check_length,
    decode,
    ids_of_text,
    parse,
    table,
    tables,
)
from benchmarks.quality.prefill import load_model, rope_about, rope_scaling
from tests.support.graph_recorder import capture_on_cpu
from tests.support.tiny_llama import tiny_llama


class Letters:
    """A tokenizer whose tokens are characters."""

    def __call__(self, text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[ord(character) % 64 for character in text])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model."""
    made = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama(initializer_range=0.2).save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load_model(str(folder), "float32", "cpu")


def _ids(count: int) -> list[int]:
    return torch.randint(0, 64, (count,), generator=torch.Generator().manual_seed(1)).tolist()


def _command(monkeypatch: pytest.MonkeyPatch, *words: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["long_outputs.py", *map(str, words)])
    monkeypatch.setattr(long_outputs, "AutoTokenizer", SimpleNamespace(from_pretrained=lambda name: Letters()))


def test_the_reference_is_one_dense_forward(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_outputs, "READ", 48)
    text, whole = Text(model, "t", _ids(161), 60), torch.tensor([_ids(161)])
    with torch.no_grad():
        logits = model(whole).logits[0]
    torch.testing.assert_close(text.dense, logits[60:160])
    assert torch.equal(text.labels(0, 100), whole[0, 61:])
    assert torch.equal(text.labels(10, 12), whole[0, 71:73])


@pytest.mark.parametrize("cell", [Cell("dense", "all", 160), Cell("fitted", "160", 160)])
def test_a_budget_of_everything_is_dense_attention(model: Any, cell: Cell) -> None:
    text = Text(model, "t", _ids(161), 60)
    *_, (first, steps) = decode(model, cell.cache(model), text, 40)
    row = steps.row()
    assert (first, row["steps"], row["top1_agrees"]) == (0, 100, 1)
    assert row["kl"] < 1e-5
    assert row["nll"] == pytest.approx(float(cross_entropy(text.dense, text.labels(0, 100))), abs=2e-4)
    assert row["nll_dense"] == pytest.approx(row["nll"], abs=2e-4)


def test_a_small_budget_is_not(model: Any) -> None:
    text = Text(model, "t", _ids(161), 100)
    *_, (_, steps) = decode(model, Cell("fitted", "4", 4).cache(model), text, 64)
    assert steps.row()["kl"] > 1e-4
    assert steps.row()["nll"] != steps.row()["nll_dense"]


def test_steps_in_which_tokens_are_clustered_are_told_from_others(model: Any) -> None:
    text = Text(model, "t", _ids(1251), 1100)
    *_, (_, steps) = decode(model, Cell("fitted", "64", 64).cache(model), text, 64)
    assert steps.events.count("tokens clustered") == 1
    assert 0 < steps.events.index("tokens clustered") < 149
    assert set(steps.events) <= {*long_outputs.EVENTS, "none"}


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="captures by a fake on the CPU")
def test_first_steps_and_captures_are_told_from_others(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = capture_on_cpu(monkeypatch)
    text = Text(model, "t", _ids(67), 60)
    *_, (_, steps) = decode(model, Cell("shadowkv", "8", 8).cache(model), text, 64)
    assert steps.events == ["graph captured", "graph captured", "none", "none", "none", "none"]
    assert recorder.replays == 5


def test_slow_steps_are_counted_by_what_they_did() -> None:
    nothing = [0.0] * 6
    ms, events = [1.0, 1.0, 1.0, 2.0, 2.1, 9.0], ["none", "none", "none", "none", "none", "tokens clustered"]
    row = Steps([0.0] * 5 + [0.6], [1.0] * 6, nothing, nothing, ms, events).row()
    assert (row["median_ms"], row["max_ms"], row["kl"]) == (1.5, 9, 0.1)
    assert row["events"]["tokens clustered"] == {"steps": 1, "slow": 1, "median_ms": 9, "max_ms": 9}
    assert row["events"]["none"] == {"steps": 5, "slow": 0, "median_ms": 1, "max_ms": 2.1}
    row = Steps(nothing, nothing, nothing, nothing, [1, 1, 1, 1, 2.1, 9], events).row()
    assert row["slowest"] == [[6, 9, "tokens clustered"], [5, 2.1, "none"]]
    lines = table({"rows": {"a, b, fitted, 1/64, 4096": row, "c, fitted, 1/64, 0": row}}, "a, b")
    assert len(lines) == 3
    assert (
        lines[2] == "| fitted | 1/64 | 4,097 to 4,102 | 0.0000 | 0.0% | 0.000 | 0.000 | 1.00 | 9.00 | 2 | 1 | 0 | 1 |"
    )


def test_a_run_writes_rows_and_measures_only_what_is_missing(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(long_outputs, "BUCKET", 40)
    monkeypatch.setattr(long_outputs, "COMPARED", 20)
    play = tmp_path / "a play.txt"
    play.write_text("".join(map(chr, _ids(400))))
    words = ["--model", folder, "--text", play, "--dtype", "float32", "--output", tmp_path / "results"]
    words += ["--prompt", 80, "--tokens", 60]
    _command(monkeypatch, *words, "--budgets", "16", "1/10", "--seconds", 0)
    long_outputs.main()
    file = tmp_path / "results" / "long-outputs-tiny.json"
    assert not file.exists()
    _command(monkeypatch, *words, "--budgets", "16", "1/10")
    long_outputs.main()
    result = json.loads(file.read_text())
    names = [f"a play, {cell}, {first}" for cell in ("fitted, 16", "fitted, 1/10", "dense, all") for first in (0, 40)]
    assert list(result["rows"]) == names
    assert [row["steps"] for row in result["rows"].values()] == [40, 20] * 3
    assert (result["prompt"], result["generated"], result["tokens"]) == (80, 60, 140)
    assert str(tmp_path) not in result["commands"][0]
    assert "rope_scaling" not in result
    assert result["rows"][names[0]]["attended_tokens"] < 140 > result["rows"][names[2]]["attended_tokens"]
    assert result["rows"][names[4]]["kl"] < 1e-5 < result["rows"][names[0]]["kl"]
    assert tables([result])[0][0] == "tiny, a play, a prompt of 80 tokens"
    assert tables([{**result, "rope_scaling": "yarn:4"}])[0][0].startswith("tiny, yarn:4, a play, ")
    assert "| dense | all | 41 to 60 | " in capsys.readouterr().out

    result["rows"][names[3]]["steps"] = 10  # as if the run had been stopped
    result["rows"][names[0]]["kl"] = result["rows"][names[2]]["kl"] = 5.0
    file.write_text(json.dumps(result))
    long_outputs.main()
    rows = json.loads(file.read_text())["rows"]
    assert rows[names[0]]["kl"] == 5
    assert rows[names[2]]["kl"] < 5
    assert rows[names[3]]["steps"] == 20


def test_a_run_stops_when_the_time_is_over(tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_outputs, "COMPARED", 20)
    rows, cell = Rows(tmp_path / "rows.json", {}, ""), Cell("fitted", "16", 16)
    text = Text(model, "t", _ids(141), 80)
    long_outputs.measure(model, cell, text, rows, 0.0, SimpleNamespace(update=lambda _: None))
    assert rows["t, fitted, 16, 0"]["steps"] == 20
    assert not long_outputs.is_complete(rows, cell, "t", 60)


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert [cell.tokens for cell in parse(["--model", "m"]).cells] == [2048, 512, 32768]
    assert cells_of(["quest"], ["1/64"], 6400) == [Cell("quest", "1/64", 100)]
    for wrong in ("0", "1/0", "2/64", "x", "1/65", "-1"):
        with pytest.raises(ArgumentTypeError, match="such as 1/64"):
            budget_of(wrong, 64)
    with pytest.raises(SystemExit):
        parse(["--model", "m", "--budgets", "1.5"])
    assert "--budgets: expected a number" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(["--model", "m", "--tokens", "0"])
    with pytest.raises(ValueError, match="play: expected 9 tokens, got 5"):
        ids_of_text(Letters(), "play", "words", 9)


def test_longer_contexts_need_other_rotary_embeddings(folder: Path, model: Any) -> None:
    check_length(model, 2048)
    with pytest.raises(ValueError, match="at most 2048 tokens of prompt and output, got 2049"):
        check_length(model, 2049)
    longer = load_model(str(folder), "float32", "cpu", "yarn:4")
    check_length(longer, 8192)
    ids = torch.tensor([_ids(30)])
    with torch.no_grad():
        assert not torch.allclose(longer(ids).logits, model(ids).logits)
    from_config = AutoConfig.from_pretrained(folder)
    from_config.rope_parameters = {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048, "rope_theta": 10000.0,
    }  # fmt: skip
    expected = LlamaForCausalLM(from_config).model.rotary_emb
    torch.testing.assert_close(longer.model.rotary_emb.inv_freq, expected.inv_freq)
    assert longer.model.rotary_emb.attention_scaling == expected.attention_scaling > 1
    assert rope_about(Namespace(rope_scaling="yarn:4")) == {"rope_scaling": "yarn:4"}
    for wrong in ("yarn", "linear:4", "yarn:0.5", "yarn:x"):
        with pytest.raises(ArgumentTypeError, match="such as yarn:4"):
            rope_scaling(wrong)
