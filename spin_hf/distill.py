"""Gates for `SeerAttention`, trained on a model's own attention: `python -m spin_hf.distill MODEL --text FILE --output DIR`.

    --steps 500 --tokens 4096     windows of the text, one a step      --lr 0.001    with warm-up and cosine decay to a tenth
    --block 32                    tokens of a page                     --queries 512 of a window, drawn anew for each
    --device auto                 CUDA if there is one                 --convert DIR the authors' gates instead of training

What a gate is asked for is what a cache asks it: of the pages that are neither sinks nor recent, how much of the attention
each deserves. The target is the largest attention weight of a page's tokens and of the group's heads, normalised over these
pages (as in arXiv 2506.08889, which leaves out the query's own block only); the loss is the KL divergence from it.

    DIR/gates.safetensors    what SeerAttention(DIR) reads
    DIR/distill.json         settings, device, seconds of all runs together, loss of every step and on text that is held out
    DIR/loss.csv             loss of every step
    DIR/state.safetensors    weights and Adam's moments: the same command goes on where it stopped, with the same losses
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from .attention.gates import FILE_NAME, Gates, LayerGate, describe
from .attention.seer import PAGE_SIZES
from .config import require_count
from .errors import OptionError, SpinError
from .released import convert
from .teacher import Rotation, Seen, Teacher, page_attention

_STATE, _REPORT, _CURVE = "state.safetensors", "distill.json", "loss.csv"
_WARM_UP, _HELD_OUT, _HELD_OUT_WINDOWS = 10, 0.1, 2


@dataclass(frozen=True)
class Settings:
    """What a training run does; a run goes on only with the same.

    Attributes:
        steps: windows to train on; 0 gives the gates to begin with.
        tokens: of a window.
        lr: Adam's step size at its highest.
        block: tokens of a page.
        gate_dim: numbers of a gate key; None for as many as a key has.
        queries: of a window, that the loss is taken at.
        num_sink_tokens, recent_window: pages with these are not asked for, as the cache always attends to them.
        seed: of windows and queries.
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
        for name, minimum in (("steps", 0), ("queries", 1), ("num_sink_tokens", 0), ("recent_window", 1)):
            require_count(name, getattr(self, name), minimum)
        if self.block not in PAGE_SIZES:
            raise OptionError(f"block: expected one of {PAGE_SIZES}, got {self.block}; pass 32")
        if self.gate_dim is not None and (self.gate_dim < 2 or self.gate_dim % 2):
            raise OptionError(f"gate_dim: expected an even number of 2 or more, got {self.gate_dim}; pass 64")
        if not self.lr > 0:
            raise OptionError(f"lr: expected more than 0, got {self.lr}; pass 0.001")
        require_count("tokens", self.tokens, self.first_position + 1)

    @property
    def first_position(self) -> int:
        """The first query that has two pages to choose from."""
        return self.block * (-(-self.num_sink_tokens // self.block) + 2) + self.recent_window - 1

    def candidates(self, positions: Tensor, num_pages: int) -> Tensor:
        """Pages [Q, N], bool, that a cache would let a method choose from for queries at `positions` [Q]."""
        first = torch.arange(num_pages, device=positions.device) * self.block
        return (first >= self.num_sink_tokens) & (first + self.block + self.recent_window <= positions.unsqueeze(1) + 1)


def untrained(teacher: Teacher, rotations: dict[int, Rotation], settings: Settings, token: int) -> dict[int, LayerGate]:
    """Gates to begin with, whose matrices are parameters: the mean key, and the mean of the group's queries.

    With a `gate_dim` of its own the matrices are random.
    """
    gates: dict[int, LayerGate] = {}
    generator = torch.Generator().manual_seed(settings.seed)

    def make(layer: int, seen: Seen) -> None:
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


def gate_loss(gate: LayerGate, seen: Seen, positions: Tensor, settings: Settings) -> Tensor:
    """KL divergence (nats, mean over KV heads and queries) of what a gate says from what the model attends to.

    Args:
        positions: [Q], int64, ascending, from `Settings.first_position` on.
    """
    num_pages, block = seen.keys.shape[1] // settings.block, settings.block
    candidates = settings.candidates(positions, num_pages)
    target = page_attention(seen, positions, block).where(candidates, 0.0)
    target = target / target.sum(-1, keepdim=True).clamp(min=1e-30)
    places = torch.arange(num_pages * block, device=positions.device).view(1, 1, num_pages, block)
    pages = seen.keys[None, :, : num_pages * block].unflatten(2, (num_pages, block))
    keys = gate.of_pages(pages, torch.ones_like(places, dtype=torch.bool), places)[0]
    asked = gate.of_queries(seen.queries[:, :, positions].permute(2, 0, 1, 3), positions)
    logits = torch.einsum("qhe,hne->hqn", asked, keys) / math.sqrt(keys.shape[-1])
    said = logits.masked_fill(~candidates, float("-inf")).log_softmax(-1).where(candidates, 0.0)
    return (torch.special.xlogy(target, target) - target * said).sum(-1).mean()


def distill(model: PreTrainedModel, ids: Tensor, output: Path, settings: Settings, *, save_every: int = 50) -> Gates:
    """Train gates for `model` on a text, or go on with a run that was stopped.

    Args:
        ids: [tokens], int64, on the CPU; the last tenth is held out, to measure on.
        output: folder that is written, see the module's head.
        save_every: steps between two states on the disk.
    Raises:
        OptionError: the text is too short, or `output` holds another run.
        UnsupportedModelError: the model's keys are not rotated in a way that can be undone.
    """
    held_out = max(int(len(ids) * _HELD_OUT), settings.tokens)
    if len(ids) - held_out < settings.tokens:
        raise OptionError(
            f"text: expected at least {2 * settings.tokens} tokens, to train on one window and measure on another, "
            f"got {len(ids)}; give more text, or pass fewer --tokens"
        )
    begun, teacher = time.monotonic(), Teacher(model)
    about = {**describe(teacher.config), "text": sha256(ids.numpy().tobytes()).hexdigest()[:16]}
    output.mkdir(parents=True, exist_ok=True)
    run = json.loads((output / _REPORT).read_text()) if (output / _STATE).exists() else {}
    asked = json.loads(json.dumps({"settings": asdict(settings), "about": about}))
    differing = [f"{n}: {run[n]}" for n in asked if run and run[n] != asked[n]]
    if differing:
        raise OptionError(
            f"output: expected an empty folder or a run of {asked}, got one of {'; '.join(differing)} in {str(output)!r}; "
            "pass another --output"
        )
    token = int(ids[0])
    gates = untrained(teacher, teacher.find_rotations(token), settings, token)
    made = Gates(gates, settings.block, describe(teacher.config))
    parameters = {f"{layer}.{n}": getattr(gate, n) for layer, gate in gates.items() for n in ("key", "query")}
    adam = torch.optim.Adam(parameters.values(), lr=settings.lr)
    training, measured = ids[: len(ids) - held_out], ids[len(ids) - held_out :]
    if run:
        step = _load(output / _STATE, parameters, adam)
        losses, before = run["losses"][:step], run["held_out"]["before"]
    else:
        step, losses, before = 0, [], _measure(teacher, gates, measured, settings)

    def save() -> None:  # the state last: what it says was reached is on the disk
        after = _measure(teacher, gates, measured, settings) if step == settings.steps else None
        report = {
            **asked, "device": _device_name(teacher.device),
            "seconds": round(run.get("seconds", 0.0) + time.monotonic() - begun, 1),
            "held_out": {"before": before, "after": after}, "losses": losses,
        }  # fmt: skip
        _write(output / _REPORT, json.dumps(report, indent=1) + "\n")
        _write(output / _CURVE, "step,loss\n" + "".join(f"{i},{x:.6f}\n" for i, x in enumerate(losses)))
        made.save(output / FILE_NAME)
        _save(output / _STATE, parameters, adam, step)

    if not run:
        save()
    with tqdm(total=settings.steps, initial=step, unit=" steps") as bar:
        while step < settings.steps:
            window, positions = _draw(training, settings, step)
            for group in adam.param_groups:
                group["lr"] = settings.lr * _rate(step, settings.steps)
            adam.zero_grad()
            losses.append(_forward(teacher, gates, window, positions, settings, backward=True))
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
    """The mean loss of all layers over a window; each layer's gradient is taken while its keys are at hand."""
    losses: list[Tensor] = []
    positions = positions.to(teacher.device)

    def see(layer: int, seen: Seen) -> None:
        with torch.set_grad_enabled(backward):
            loss = gate_loss(gates[layer], seen, positions, settings)
            if backward:
                loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
        losses.append(loss.detach())

    teacher.watch(ids, see)
    return float(torch.stack(losses).mean())


def _measure(teacher: Teacher, gates: dict[int, LayerGate], ids: Tensor, settings: Settings) -> float:
    """The loss on text that is held out: the same windows and queries every time."""
    draws = [_draw(ids, settings, -1 - index) for index in range(_HELD_OUT_WINDOWS)]
    return sum(_forward(teacher, gates, *draw, settings, backward=False) for draw in draws) / len(draws)


def _draw(ids: Tensor, settings: Settings, step: int) -> tuple[Tensor, Tensor]:
    """The window [tokens] and the queries' positions of a step; the same whenever it is asked for."""
    generator = torch.Generator().manual_seed((settings.seed * 1_000_003 + step) % 2**63)
    start = int(torch.randint(len(ids) - settings.tokens + 1, (), generator=generator))
    first = settings.first_position
    positions = torch.randperm(settings.tokens - first, generator=generator)[: settings.queries] + first
    return ids[start : start + settings.tokens], positions.sort().values


def _rate(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / _WARM_UP) * (0.55 + 0.45 * math.cos(math.pi * step / steps))


def _by_halves(dim: int, pairs: int, interleaved: bool) -> Tensor:
    """[dim, dim]: the permutation after which channels i and dim / 2 + i are the model's i-th pair."""
    pair = torch.arange(pairs)
    first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pairs + pair)
    rest = torch.arange(2 * pairs, dim)
    return torch.eye(dim)[:, torch.cat([first, rest[: dim // 2 - pairs], second, rest[dim // 2 - pairs :]])]


def _gate_frequencies(frequencies: Tensor, dim: int, width: int) -> Tensor:
    """The model's frequencies for a gate of another width, spaced as they are; zeros for the share that is not rotated."""
    count = round(len(frequencies) * width / dim)
    if count and count != len(frequencies):
        spaced = frequencies.log().view(1, 1, -1)
        frequencies = nn.functional.interpolate(spaced, count, mode="linear", align_corners=True).flatten().exp()
    return nn.functional.pad(frequencies, (0, width // 2 - count))


def _save(path: Path, parameters: dict[str, Tensor], adam: torch.optim.Adam, step: int) -> None:
    tensors = {f"{name}.weights": value.detach() for name, value in parameters.items()}
    for name, value in parameters.items():
        tensors |= {f"{name}.{key}": moment for key, moment in adam.state.get(value, {}).items()}
    unfinished = path.with_name(path.name + ".part")
    save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, unfinished, {"step": str(step)})
    os.replace(unfinished, path)


def _load(path: Path, parameters: dict[str, Tensor], adam: torch.optim.Adam) -> int:
    with safe_open(path, "pt") as opened, torch.no_grad():
        step = int(opened.metadata()["step"])
        for name, value in parameters.items():
            value.copy_(opened.get_tensor(f"{name}.weights"))
            if step:  # else Adam has no moments yet
                moments = {key: opened.get_tensor(f"{name}.{key}") for key in ("exp_avg", "exp_avg_sq", "step")}
                adam.state[value] = {key: t if key == "step" else t.to(value.device) for key, t in moments.items()}
        return step


def _device_name(device: torch.device) -> str:
    """What a person calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _write(path: Path, text: str) -> None:
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text)
    unfinished.replace(path)


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
    parser.add_argument("--gate-dim", type=int, help="numbers of a gate key (default: as many as a key has)")
    parser.add_argument("--sinks", type=int, default=defaults.num_sink_tokens, help="the cache's num_sink_tokens")
    parser.add_argument("--recent", type=int, default=defaults.recent_window, help="the cache's recent_window")
    parser.add_argument("--save-every", type=int, default=50, metavar="STEPS")
    parser.add_argument("--device", default="auto", help='"auto", "cpu", "cuda", "cuda:1"')
    args = parser.parse_args(arguments)
    if (args.text is None) == (args.convert is None):
        parser.error("expected --text FILE (to train) or --convert DIR (to convert), and not both")
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if device == "cpu" else "auto"
    try:
        settings = Settings(
            args.steps, args.tokens, args.lr, args.block, args.gate_dim, args.queries, args.sinks, args.recent, args.seed
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device)
        if args.convert is not None:
            args.output.mkdir(parents=True, exist_ok=True)
            convert(args.convert, Teacher(model)).save(args.output / FILE_NAME)
            print(f"wrote {args.output / FILE_NAME}")
            return
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        texts = (tokenizer(p.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False) for p in args.text)
        ids = torch.cat([torch.tensor(text.input_ids) for text in texts])
        distill(model, ids, args.output, settings, save_every=args.save_every)
    except (SpinError, OSError) as error:
        parser.error(str(error))
    report = json.loads((args.output / _REPORT).read_text())
    print(f"held-out loss {report['held_out']['before']:.4f} untrained, {report['held_out']['after']:.4f} trained")
    print(f"use them with SpinCache(model, SeerAttention({str(args.output)!r}))")


if __name__ == "__main__":
    main()
