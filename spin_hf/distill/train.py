"""Trains gates for `SeerAttention` on a model's own attention: `python -m spin_hf.distill MODEL --text FILE --output DIR`.

    --steps 500 --tokens 4096     one window of the text per step      --lr 0.001    with warm-up and cosine decay to a tenth
    --block 32                    tokens per page                      --queries 512 per window, drawn at random
    --device auto                 CUDA if there is one                 --convert DIR convert the authors' gates, no training

A gate scores the candidate pages: those outside the sinks and the recent window. The target of a page is the largest attention
weight over its tokens and the group's query heads, normalised over the candidates. The loss is the KL divergence of the gate's
softmax from it. (arXiv 2506.08889 excludes only the query's own block from the target.)

    DIR/gates.safetensors    the gates, for SeerAttention(DIR)
    DIR/distill.json         settings, device, total seconds of all runs, loss of every step and on held-out text
    DIR/loss.csv             loss of every step
    DIR/state.safetensors    weights and Adam's moments: the same command resumes an interrupted run, with the same losses
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from ..attention.methods.seer import PAGE_SIZES
from ..attention.methods.seer_gates import FILE_NAME, Gates, LayerGate, describe
from ..config import MOST_TOKENS, require_count, require_one_of, require_real, shown
from ..errors import OptionError, SpinError
from .checkpoint import DAMAGED, REPORT, STATE, load_state, read_report, save_state, unreadable, write_text
from .convert_release import read_release
from .teacher import LayerAttention, Rotation, Teacher, page_attention

_CURVE = "loss.csv"
_MOST_SEED, _MOST_GATE_DIM = 2**63 - 1, 4096
_WARM_UP, _HELD_OUT, _HELD_OUT_WINDOWS = 10, 0.1, 2


@dataclass(frozen=True)
class Settings:
    """Settings of a training run. An interrupted run resumes only with the same settings.

    Attributes:
        steps: windows to train on; 0 gives untrained gates.
        tokens: tokens per window.
        lr: peak learning rate of Adam.
        block: tokens per page.
        gate_dim: dimension E of a gate key; None for that of a key.
        queries: queries per window that enter the loss.
        num_sink_tokens, recent_window: the cache's. Pages with these tokens are no candidates, as the cache always attends to
            them.
        seed: seed of windows and queries.
    """

    steps: int = 500
    tokens: int = 4096
    lr: float = 1e-3
    block: int = 32
    gate_dim: int | None = None
    queries: int = 512
    num_sink_tokens: int = 4
    recent_window: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        plain: dict[str, int | float] = {}
        for name, minimum in (("steps", 0), ("queries", 1), ("num_sink_tokens", 0), ("recent_window", 1)):
            plain[name] = require_count(name, getattr(self, name), minimum, MOST_TOKENS)
        plain["seed"] = require_count("seed", self.seed, 0, _MOST_SEED)
        plain["block"] = require_one_of("block", self.block, PAGE_SIZES, example=32)
        if self.gate_dim is not None:
            plain["gate_dim"] = require_count("gate_dim", self.gate_dim, 2, _MOST_GATE_DIM, example=64)
            if plain["gate_dim"] % 2:
                raise OptionError(f"gate_dim: expected an even number, got {self.gate_dim}; pass gate_dim=64")
        plain["lr"] = require_real("lr", self.lr, 0.001)
        if not 0 < plain["lr"] <= 1:
            raise OptionError(f"lr: expected more than 0 and at most 1, got {plain['lr']}; pass lr=0.001")
        for name, value in plain.items():
            object.__setattr__(self, name, value)
        least = self.first_position + 1
        object.__setattr__(self, "tokens", require_count("tokens", self.tokens, least, max(least, MOST_TOKENS)))

    @property
    def first_position(self) -> int:
        """The first query with two candidates."""
        return self.block * (-(-self.num_sink_tokens // self.block) + 2) + self.recent_window - 1

    def candidates(self, positions: Tensor, num_pages: int) -> Tensor:
        """Candidate pages [Q, N], bool, of queries at `positions` [Q]."""
        first = torch.arange(num_pages, device=positions.device) * self.block
        return (first >= self.num_sink_tokens) & (first + self.block + self.recent_window <= positions.unsqueeze(1) + 1)


def untrained(teacher: Teacher, rotations: dict[int, Rotation], settings: Settings, token: int) -> dict[int, LayerGate]:
    """Initial gates; their matrices are parameters. A gate key is the mean key, a gate query the mean of the group's queries.

    If `gate_dim` differs from the size of a key, the matrices are random.
    """
    gates: dict[int, LayerGate] = {}
    generator = torch.Generator().manual_seed(settings.seed)

    def make(layer: int, seen: LayerAttention) -> None:
        heads, group, _, dim = seen.queries.shape
        turned, width = rotations[layer], settings.gate_dim or dim
        frequencies = turned.frequencies
        key, query = torch.zeros((heads, 3 * dim, width)), torch.zeros((heads, group, dim, width))
        if width == dim:
            placed = _by_halves(dim, len(frequencies), turned.interleaved)
            key[:, 2 * dim :], query[:] = placed, placed * seen.scale * math.sqrt(width) / group
        else:
            for weights, fan_in in ((key, 3 * dim), (query, group * dim)):
                weights.copy_(torch.randn(weights.shape, generator=generator) / math.sqrt(fan_in))
        own = _gate_frequencies(frequencies, dim, width)
        key, query = nn.Parameter(key.to(teacher.device)), nn.Parameter(query.to(teacher.device))
        gates[layer] = LayerGate(key, query, frequencies, own, turned.interleaved)

    teacher.watch(torch.full((2,), token), make)
    return gates


def gate_loss(gate: LayerGate, seen: LayerAttention, positions: Tensor, settings: Settings) -> Tensor:
    """KL divergence of a gate's scores from the model's attention by page: nats, mean over KV heads and queries.

    Args:
        positions: [Q], int64, ascending, at least `Settings.first_position`.
    """
    num_pages, block = seen.keys.shape[1] // settings.block, settings.block
    candidates = settings.candidates(positions, num_pages)
    target = page_attention(seen, positions, block).where(candidates, 0.0)
    target = target / target.sum(-1, keepdim=True).clamp(min=1e-30)
    places = torch.arange(num_pages * block, device=positions.device).view(1, 1, num_pages, block)
    pages = seen.keys[None, :, : num_pages * block].unflatten(2, (num_pages, block))
    keys = gate.of_pages(pages, torch.ones_like(places, dtype=torch.bool), places)[0]
    queries = gate.of_queries(seen.queries[:, :, positions].permute(2, 0, 1, 3), positions)
    logits = torch.einsum("qhe,hne->hqn", queries, keys) / math.sqrt(keys.shape[-1])
    log_scores = logits.masked_fill(~candidates, float("-inf")).log_softmax(-1).where(candidates, 0.0)
    return (torch.special.xlogy(target, target) - target * log_scores).sum(-1).mean()


def distill(model: PreTrainedModel, ids: Tensor, output: Path, settings: Settings, *, save_every: int = 50) -> Gates:
    """Train gates for `model` on a text, or resume an interrupted run.

    Args:
        ids: [tokens], int64, on the CPU. The last tenth, at least one window, is held out for measurements.
        output: folder to write, see the module's head.
        save_every: steps between two checkpoints.
    Raises:
        OptionError: the text is too short, `output` holds another run or a damaged one, or training diverges. The last
            checkpoint stays.
        UnsupportedModelError: the RoPE of the model's keys cannot be inverted.
    """
    require_count("save_every", save_every, 1, example=50)
    if ids.dim() != 1 or ids.dtype != torch.int64:
        raise OptionError(
            f"ids: expected [tokens], int64, got {tuple(ids.shape)}, {ids.dtype}; pass one row of token ids"
        )
    held_out = max(int(len(ids) * _HELD_OUT), settings.tokens)
    if len(ids) - held_out < settings.tokens:
        raise OptionError(
            f"text: expected at least {2 * settings.tokens} tokens, to train on one window and measure on another, "
            f"got {len(ids)}; give more text, or pass fewer --tokens"
        )
    begun, teacher = time.monotonic(), Teacher(model)
    about = {**describe(teacher.config), "text": sha256(ids.numpy().tobytes()).hexdigest()[:16]}
    output.mkdir(parents=True, exist_ok=True)
    run = read_report(output) if (output / STATE).exists() else {}
    wanted = json.loads(json.dumps({"settings": asdict(settings), "about": about}))
    differing = [f"{n}: {run[n]}" for n in wanted if run and run[n] != wanted[n]]
    if differing:
        raise OptionError(
            f"output: expected an empty folder or a run of {wanted}, got one of {'; '.join(differing)} in {str(output)!r}; "
            "pass another --output"
        )
    token = int(ids[0])
    gates = untrained(teacher, teacher.find_rotations(token), settings, token)
    made = Gates(gates, settings.block, describe(teacher.config))
    parameters = {f"{layer}.{n}": getattr(gate, n) for layer, gate in gates.items() for n in ("key", "query")}
    adam = torch.optim.Adam(parameters.values(), lr=settings.lr)
    training, measured = ids[: len(ids) - held_out], ids[len(ids) - held_out :]
    if run:
        try:
            step = load_state(output / STATE, parameters, adam)
            losses, before = run["losses"][:step], run["held_out"]["before"]
            if not 0 <= step == len(losses) <= settings.steps:
                raise ValueError(f"{step} steps, and {len(losses)} losses")
        except torch.OutOfMemoryError:
            raise
        except DAMAGED as error:
            raise unreadable(output, STATE, error) from error
    else:
        step, losses, before = 0, [], _measure(teacher, gates, measured, settings)

    def save() -> None:  # state.safetensors last: the steps that it counts are in the other files
        after = _measure(teacher, gates, measured, settings) if step == settings.steps else None
        report = {
            **wanted, "device": _device_name(teacher.device),
            "seconds": round(run.get("seconds", 0.0) + time.monotonic() - begun, 1),
            "held_out": {"before": before, "after": after}, "losses": losses,
        }  # fmt: skip
        made.save(output / FILE_NAME)  # raises if training has diverged, before the other files change
        write_text(output / REPORT, json.dumps(report, indent=1) + "\n")
        write_text(output / _CURVE, "step,loss\n" + "".join(f"{i},{x:.6f}\n" for i, x in enumerate(losses)))
        save_state(output / STATE, parameters, adam, step)

    if not run:
        save()
    with logging.tqdm(total=settings.steps, initial=step, desc="training", unit=" steps") as bar:
        while step < settings.steps:
            window, positions = _draw(training, settings, step)
            for group in adam.param_groups:
                group["lr"] = settings.lr * _rate(step, settings.steps)
            adam.zero_grad()
            loss = _forward(teacher, gates, window, positions, settings, backward=True)
            if not math.isfinite(loss):
                raise OptionError(
                    f"lr: expected a finite loss, got {loss} at step {step} with lr={settings.lr}; pass a lower --lr and "
                    f"another --output; {str(output)!r} holds the last state that was saved"
                )
            losses.append(loss)
            adam.step()
            step += 1
            bar.update()
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
            if step % save_every == 0 or step == settings.steps:
                save()
    return made


def _forward(
    teacher: Teacher, gates: dict[int, LayerGate], ids: Tensor, positions: Tensor, settings: Settings, *, backward: bool
) -> float:
    """The mean loss of all layers over a window. Each layer's backward pass runs inside its attention call."""
    losses: list[Tensor] = []
    positions = positions.to(teacher.device)

    def see(layer: int, seen: LayerAttention) -> None:
        with torch.set_grad_enabled(backward):
            loss = gate_loss(gates[layer], seen, positions, settings)
            if backward:
                loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
        losses.append(loss.detach())

    teacher.watch(ids, see)
    return float(torch.stack(losses).mean())


def _measure(teacher: Teacher, gates: dict[int, LayerGate], ids: Tensor, settings: Settings) -> float:
    """The loss on held-out text, always on the same windows and queries."""
    draws = [_draw(ids, settings, -1 - index) for index in range(_HELD_OUT_WINDOWS)]
    losses = [
        _forward(teacher, gates, window, positions, settings, backward=False)
        for window, positions in logging.tqdm(draws, desc="held-out loss", unit=" windows", leave=False)
    ]
    return sum(losses) / len(losses)


def _draw(ids: Tensor, settings: Settings, step: int) -> tuple[Tensor, Tensor]:
    """The window [tokens] and the positions of the queries of a step. Deterministic for a step and seed."""
    generator = torch.Generator().manual_seed((settings.seed * 1_000_003 + step) % 2**63)
    start = int(torch.randint(len(ids) - settings.tokens + 1, (), generator=generator))
    first = settings.first_position
    positions = torch.randperm(settings.tokens - first, generator=generator)[: settings.queries] + first
    return ids[start : start + settings.tokens], positions.sort().values


def _rate(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / _WARM_UP) * (0.55 + 0.45 * math.cos(math.pi * step / steps))


def _by_halves(dim: int, pairs: int, interleaved: bool) -> Tensor:
    """[dim, dim]: the permutation that moves the model's i-th RoPE pair to channels i and dim / 2 + i."""
    pair = torch.arange(pairs)
    first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pairs + pair)
    rest = torch.arange(2 * pairs, dim)
    return torch.eye(dim)[:, torch.cat([first, rest[: dim // 2 - pairs], second, rest[dim // 2 - pairs :]])]


def _gate_frequencies(frequencies: Tensor, dim: int, width: int) -> Tensor:
    """Frequencies [width / 2] for a gate: the model's, resampled in log space; zeros for the channels without RoPE."""
    count = round(len(frequencies) * width / dim)
    if count and count != len(frequencies):
        spaced = frequencies.log().view(1, 1, -1)
        frequencies = nn.functional.interpolate(spaced, count, mode="linear", align_corners=True).flatten().exp()
    return nn.functional.pad(frequencies, (0, width // 2 - count))


def _device_name(device: torch.device) -> str:
    """The GPU's name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _text(file: Path) -> str:
    """A training text."""
    try:
        return file.read_text(encoding="utf-8")
    except ValueError as error:
        raise OptionError(f"text: expected UTF-8 in {shown(str(file))}, got {error}; convert it first") from error


def _device(name: str) -> torch.device:
    """The device of a name; "auto" is the GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise OptionError(f'device: expected "auto", "cpu", "cuda" or "cuda:1", got {name!r} ({error})') from error
    return device


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    defaults = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m spin_hf.distill", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder or hub id of a causal language model")
    parser.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="texts to train on, UTF-8")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for gates, losses and state")
    parser.add_argument(
        "--convert", type=Path, metavar="DIR", help="the authors' gates: config.json and attn_gate_weights.pth"
    )
    for name in ("steps", "tokens", "block", "queries", "seed"):
        parser.add_argument(f"--{name}", type=int, default=getattr(defaults, name))
    parser.add_argument("--lr", type=float, default=defaults.lr)
    parser.add_argument("--gate-dim", type=int, help="dimension of a gate key (default: that of a key)")
    parser.add_argument("--sinks", type=int, default=defaults.num_sink_tokens, help="the cache's num_sink_tokens")
    parser.add_argument("--recent", type=int, default=defaults.recent_window, help="the cache's recent_window")
    parser.add_argument("--save-every", type=int, default=50, metavar="STEPS")
    parser.add_argument("--device", default="auto", help='"auto", "cpu", "cuda", "cuda:1"')
    args = parser.parse_args(arguments)
    if (args.text is None) == (args.convert is None):
        parser.error("expected --text FILE (to train) or --convert DIR (to convert), and not both")
    try:
        device = _device(args.device)
        dtype = torch.float32 if device.type == "cpu" else "auto"
        settings = Settings(
            args.steps, args.tokens, args.lr, args.block, args.gate_dim, args.queries, args.sinks, args.recent, args.seed
        )  # fmt: skip
        require_count("save_every", args.save_every, 1, example=50)
        release = None if args.convert is None else read_release(args.convert)
        texts = [] if args.text is None else [_text(file) for file in args.text]
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device)
        if release is not None:
            gates = release.gates(Teacher(model))
            args.output.mkdir(parents=True, exist_ok=True)
            gates.save(args.output / FILE_NAME)
            print(f"wrote {args.output / FILE_NAME}")
            return
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        encoded = (tokenizer(text, add_special_tokens=False, verbose=False) for text in texts)
        ids = torch.cat([torch.tensor(text.input_ids, dtype=torch.int64) for text in encoded])
        distill(model, ids, args.output, settings, save_every=args.save_every)
    except (SpinError, OSError) as error:
        parser.error(str(error))
    report = json.loads((args.output / REPORT).read_text())
    print(f"held-out loss {report['held_out']['before']:.4f} untrained, {report['held_out']['after']:.4f} trained")
    print(f"use them with SpinCache(model, SeerAttention({str(args.output)!r}))")
