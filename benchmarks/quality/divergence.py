"""How far a model's next tokens are from dense ones, by log-probabilities. Needs torch alone: kvpress's side has it too."""

from __future__ import annotations

import torch
from torch import Tensor


def divergence(dense: Tensor, sparse: Tensor) -> dict[str, float]:
    """KL of `sparse` from `dense`, log-probabilities [steps, vocabulary]: mean, 90th percentile, in nats; top-1 agreement."""
    kl = (dense.exp() * (dense - sparse)).sum(-1)
    same = (dense.argmax(-1) == sparse.argmax(-1)).float().mean()
    return {
        "kl": round(float(kl.mean()), 5), "kl_p90": round(float(torch.quantile(kl, 0.9)), 5),
        "top1_agrees": round(float(same), 4),
    }  # fmt: skip
