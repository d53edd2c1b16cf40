"""Examples of many requests: several processes, Ray Data, lm-evaluation-harness, TRL, and the drawing.

The three libraries are not installed here: their examples run with stand-ins of what they import, which have the interfaces of
ray 2.60, lm_eval 0.4.13 and trl 1.16.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from spin_hf import EventLog, RequestLoop
from tests.support.loop_schedules import generated_alone
from tests.support.tokenizers import letters
from tests.support.zoo import build_model, random_tokens

EXAMPLES = Path(__file__).parents[2] / "examples"
TEXTS = [letters().decode(random_tokens(1, length, seed=length)[0]) for length in (9, 30, 17)]


@pytest.fixture(autouse=True)
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer."""
    made = tmp_path_factory.mktemp("models") / "tiny"
    build_model("llama").save_pretrained(made)
    letters().save_pretrained(made)
    return made


def expected(text: str, number: int, **kwargs: Any) -> list[int]:
    return generated_alone(build_model("llama"), letters()(text)["input_ids"], {}, max_new_tokens=number, **kwargs)


def test_ray_data_maps_batches(folder: Path) -> None:
    from ray_data import Generate

    batch = Generate(str(folder), "cpu", max_new_tokens=5, do_sample=False)({"prompt": np.array(TEXTS)})
    assert list(batch["prompt"]) == TEXTS
    assert list(batch["answer"]) == [letters().decode(expected(text, 5)) for text in TEXTS]
    assert set(batch["finish_reason"]) == {"length"}


class StandIn:
    """`HFLM`, as far as the example uses it."""

    max_gen_toks, max_length, eot_token_id, think_end_token = 6, 64, 1, None

    def __init__(self) -> None:
        self.model, self.tokenizer, self.added = build_model("llama"), letters(), list[Any]()
        self.cache_hook = SimpleNamespace(add_partial=lambda *given: self.added.append(given))

    def tok_encode(self, text: str, left_truncate_len: int) -> list[int]:
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids[-left_truncate_len:]

    def tok_decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        return self.tokenizer.decode(ids)


def _normalize(given: dict[str, Any], most: int) -> dict[str, Any]:
    return {"do_sample": False, "temperature": 0.0, "max_gen_toks": most, **given}


def _cut(generation: str, stop: list[str], think_end_token: str | None) -> str:
    for text in stop:
        generation = generation.split(text)[0]
    return generation


def test_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {
        "lm_eval": dict(simple_evaluate=None),
        "lm_eval.models": {},
        "lm_eval.models.huggingface": dict(HFLM=StandIn),
        "lm_eval.models.utils": dict(
            normalize_gen_kwargs=_normalize, handle_stop_sequences=lambda until, eos: [*(until or []), eos],
            postprocess_generated_text=_cut,
        ),
    }  # fmt: skip
    for name, contents in modules.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    from lm_eval_loop import SpinLM

    tokens = expected(TEXTS[1], 6)
    stop = letters().decode(tokens[2:4])
    model = SpinLM()
    requests = [
        SimpleNamespace(args=(TEXTS[0], {})), SimpleNamespace(args=(TEXTS[1], {"until": [stop]})),
        SimpleNamespace(args=(TEXTS[2], {"max_gen_toks": 3})),
    ]  # fmt: skip
    answers = model.generate_until(requests)
    assert answers[0] == letters().decode(expected(TEXTS[0], 6))
    assert answers[1] == letters().decode(tokens).split(stop)[0]
    assert answers[2] == letters().decode(expected(TEXTS[2], 3))
    assert model.added == [
        ("generate_until", request.args, answer) for request, answer in zip(requests, answers, strict=True)
    ]


def test_trl_rollout() -> None:
    from trl_rollout import Rollout

    model = build_model("llama").train()
    trainer = SimpleNamespace(
        model=model, accelerator=SimpleNamespace(unwrap_model=lambda model: model), processing_class=letters(),
        args=SimpleNamespace(max_completion_length=4, temperature=0.7),
    )  # fmt: skip
    output = Rollout(seed=3)(TEXTS, trainer)
    assert model.training
    assert [len(each) for each in output["completion_ids"]] == [4] * 3
    assert output["prompt_ids"] == [letters()(text)["input_ids"] for text in TEXTS]
    model.eval()
    for prompt, completion, found in zip(
        *(output[key] for key in ("prompt_ids", "completion_ids", "logprobs")), strict=True
    ):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / 0.7
        logprobs = torch.log_softmax(logits, -1)
        assert found == pytest.approx([float(logprobs[i, token]) for i, token in enumerate(completion)], abs=1e-4)


def test_the_drawing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import draw_requests

    file = tmp_path / "events.jsonl"
    log = EventLog(file)
    with RequestLoop(build_model("llama"), tokenizer=letters(), events=log) as loop:
        for text in TEXTS:
            loop.submit(text, max_new_tokens=5)
    log.close()
    made = draw_requests.panels(list(log.events))
    assert sum(rows for _, rows in made["requests per step"]) == 12
    monkeypatch.setattr(sys, "argv", ["draw_requests.py", str(file), "--output", str(tmp_path / "made.svg")])
    draw_requests.main()
    assert (tmp_path / "made.svg").read_text().count("<polyline") == 3
    with pytest.raises(SystemExit, match="expected events"):
        draw_requests.panels([])


@pytest.mark.slow
def test_two_processes(folder: Path, tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    prompts.write_text("\n".join(TEXTS))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
         str(EXAMPLES / "generate_batch_distributed.py"), "--model", str(folder), "--prompts", str(prompts),
         "--max-new-tokens", "4", "--output", str(output)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "PYTHONPATH": str(EXAMPLES.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "3 answers of 2 processes" in done.stdout
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [answer["prompt"] for answer in answers] == TEXTS
    assert [answer["answer"] for answer in answers] == [letters().decode(expected(text, 4)) for text in TEXTS]
