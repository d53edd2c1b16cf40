"""Rollouts for TRL's GRPOTrainer by a loop: prompts of a step join and leave one running batch.

    from trl import GRPOTrainer
    trainer = GRPOTrainer(model=..., reward_funcs=..., args=..., train_dataset=..., rollout_func=Rollout(budget=2048))

A rollout function gets the prompts of this process, each as often as completions are wanted, and returns their ids, those of
the completions, and log-probabilities. A loop returns tokens only, so one more forward of each sequence computes the latter.
The weights change between two calls: each makes a loop of its own, without a store.
"""

from __future__ import annotations

from typing import Any

import torch

import spin_hf


class Rollout:
    """A `rollout_func` of `GRPOTrainer`.

    Args:
        options: as for `spin_hf.generate_batch`.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        """A completion of each prompt: `prompt_ids`, `completion_ids` and `logprobs`."""
        model, args = trainer.accelerator.unwrap_model(trainer.model), trainer.args
        was_training = model.training
        model.eval()  # a step with dropout or checkpoints is not captured
        try:
            results = spin_hf.generate_batch(
                model, prompts, tokenizer=trainer.processing_class, max_new_tokens=args.max_completion_length,
                do_sample=True, temperature=args.temperature, progress=False, **self.options,
            )  # fmt: skip
            failed = next((result.error for result in results if result.error is not None), None)
            if failed is not None:
                raise failed
            logprobs = [self._logprobs(model, result, args.temperature) for result in results]
        finally:
            model.train(was_training)
        return {
            "prompt_ids": [result.prompt for result in results],
            "completion_ids": [result.tokens for result in results],
            "logprobs": logprobs,
        }

    @staticmethod
    @torch.no_grad()
    def _logprobs(model: Any, result: spin_hf.RequestResult, temperature: float) -> list[float]:
        """Log-probability of each generated token."""
        ids = result.sequences.to(model.device)
        number = len(result.tokens)
        logits = model(ids, logits_to_keep=number + 1).logits[0, :-1].float() / temperature
        return torch.log_softmax(logits, -1).gather(1, ids[0, -number:, None])[:, 0].tolist()
