"""lm-evaluation-harness with a loop: `generate_until` of `HFLM` gives all prompts of a task to one running batch.

    pip install lm_eval
    python examples/lm_eval_loop.py --model Qwen/Qwen3-0.6B --tasks gsm8k --limit 50

Log-likelihoods, chat templates and scores stay the harness's. Each request keeps its own limits and stop strings.
"""

from __future__ import annotations

import argparse
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from spin_hf import RequestHandle, RequestLoop


class SpinLM(HFLM):  # type: ignore[misc, unused-ignore]
    """`HFLM` whose prompts are answered by a `RequestLoop`.

    Args:
        loop_options: as for `RequestLoop`.
        arguments: as for `HFLM`.
    """

    def __init__(self, *arguments: Any, loop_options: dict[str, Any] | None = None, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.loop_options = loop_options or {}

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers of all requests, in their order."""
        answers = []
        with RequestLoop(self.model, tokenizer=self.tokenizer, max_slowdown=None, **self.loop_options) as loop:
            submitted = [self._submit(loop, *request.args) for request in requests]
            for request, (handle, until) in zip(requests, submitted, strict=True):
                thinks = self.think_end_token if isinstance(self.think_end_token, str) else None
                text = postprocess_generated_text(
                    generation=self.tok_decode(handle.result().tokens), stop=until, think_end_token=thinks
                )
                self.cache_hook.add_partial("generate_until", request.args, text)
                answers.append(text)
        return answers

    def _submit(self, loop: RequestLoop, context: str, given: dict[str, Any]) -> tuple[RequestHandle, list[str]]:
        """A request, and the strings that end it."""
        kwargs = dict(normalize_gen_kwargs(given, self.max_gen_toks))
        end = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        until = handle_stop_sequences(kwargs.pop("until", None), eos=end)
        most = kwargs.pop("max_gen_toks")
        if not kwargs.get("do_sample"):
            kwargs = {"do_sample": False}
        ids = self.tok_encode(context, left_truncate_len=self.max_length - most)
        strings = [text for text in until if text != end] or None
        handle = loop.submit(
            ids, max_new_tokens=most, stop_strings=strings, eos_token_id=self.eot_token_id, pad_token_id=self.eot_token_id,
            **kwargs,
        )  # fmt: skip
        return handle, until


def main() -> None:
    """Evaluate a model and print the scores."""
    parser = argparse.ArgumentParser(description="lm-evaluation-harness with a loop")
    parser.add_argument("--model", required=True, help="hub id or folder of a causal language model")
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--limit", type=int, help="documents of each task")
    parser.add_argument("--budget", type=int, default=2048)
    args = parser.parse_args()
    model = SpinLM(pretrained=args.model, loop_options={"budget": args.budget})
    results = simple_evaluate(model=model, tasks=args.tasks, limit=args.limit)
    for task, scores in results["results"].items():
        print(task, scores)


if __name__ == "__main__":
    main()
