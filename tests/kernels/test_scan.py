"""The scan over coded pages: formulas against loops in float64, kernels against the formulas, with poison in unused memory."""

from __future__ import annotations

import ctypes
import math
import os
import sys
from typing import Any

import pytest
import torch

from spin_hf.kernels import reference, reference_scan
from spin_hf.kernels.descriptor_fields import PlanField
from spin_hf.kernels.launch import Splits
from tests.support.coded_case import CHUNK, PAGE, SEGMENT, CodedCase
from tests.support.interpreted_kernels import teach_bfloat16

INTERPRETED = [
    pytest.mark.skipif(sys.platform != "linux", reason="triton exists for Linux only"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tests/gpu runs the kernels themselves"),
]
CASES: list[dict[str, Any]] = [
    {"group": 1, "key_dim": 128, "value_dim": 64, "dtype": torch.bfloat16},
    {"group": 4, "key_dim": 64, "value_dim": 128, "dtype": torch.float16, "lengths": (1100, 1100)},
    {"group": 7, "key_dim": 80, "value_dim": 80, "lengths": (1100, 307)},
    {"group": 8, "key_dim": 256, "value_dim": 48, "dtype": torch.bfloat16, "lengths": (301, 513)},
    {"group": 4, "key_dim": 64, "value_dim": 64, "digits": False},
    {"group": 4, "key_dim": 32, "value_dim": 32, "spread": 40.0},
]


def launch() -> Any:
    """Runs interpreted kernels."""
    from spin_hf.kernels.compile_ahead import launch_now

    return launch_now


def loops(case: CodedCase, b: int, h: int, g: int) -> list[float]:
    """Log weights of all pages for one query head, coordinate by coordinate."""
    basis, pages, dim = case.basis, case.pages, case.key_dim
    query = case.queries()[b, h, g]
    state = [float(query @ basis.inverse[b, h, :, j].double()) for j in range(dim)]
    constant = float(query @ basis.origin[b, h].double())
    found = []
    for page in range(case.num_pages):
        unit, total = page // 4, 0.0
        for token in range(PAGE):
            scale = float(pages.scale[b, h, page, token])
            if scale < 0:
                continue
            logit, codes = constant, pages.codes[b, h, page, token].tolist()
            for j in range(dim):
                level = 0.0
                if j < dim // 4:
                    level = (codes[j // 2] >> 4 * (j % 2) & 15) - 7.5
                elif j < 3 * dim // 4:
                    place = j - dim // 4
                    level = (codes[dim // 8 + place // 4] >> 2 * (place % 4) & 3) - 1.5
                mean = int(pages.mean[b, h, unit, j]) * float(pages.unit[b, h, unit])
                logit += state[j] * (mean + scale * level * float(basis.widths[b, h, j]))
            total += math.exp(logit * case.scale)
        found.append(math.log(total) if total else -math.inf)
    return found


def test_log_weights_by_loops() -> None:
    case = CodedCase(group=2, key_dim=16, value_dim=16, lengths=(70, 41))
    made = reference_scan.page_log_weights(case.queries(), case.basis, case.pages, case.scale)
    for b, h, g in [(0, 0, 0), (0, 1, 1), (1, 0, 1)]:
        assert made[b, h, g].tolist() == pytest.approx(loops(case, b, h, g), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("dim", [16, 80, 128])
def test_codes_hold_their_numbers(dim: int) -> None:
    numbers = torch.cat([torch.randint(0, 16, (5, dim // 4)), torch.randint(0, 4, (5, dim // 2))], -1)
    codes = reference_scan.pack(numbers)
    assert codes.shape == (5, dim // 4)
    middle = torch.cat([torch.full((dim // 4,), 7.5), torch.full((dim // 2,), 1.5)])
    expected = torch.nn.functional.pad(numbers - middle, (0, dim // 4))
    assert torch.equal(reference_scan.unpack(codes, torch.float32), expected)


def test_subtraction_is_the_estimate_of_the_rest() -> None:
    case = CodedCase(group=3, key_dim=32, value_dim=48, lengths=(400, 200), spread=5.0)
    basis, pages = case.exact("basis"), case.exact("pages")
    logs = reference_scan.page_log_weights(case.queries(), basis, pages, case.scale)
    read = torch.rand(case.candidates.shape) < 0.3
    read[0, 0] = True  # nothing is left
    expected = reference_scan.estimate(logs, case.candidates & ~read, basis, pages)
    actual = reference_scan.subtract(logs, case.candidates, read, basis, pages)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-7)  # little is left of large sums
    weights = (logs - expected[1].unsqueeze(-1)).exp() * (case.candidates & ~read).unsqueeze(2)
    levels = reference_scan.unpack(pages.value_codes, torch.float64) * pages.value_scale.unsqueeze(-1)
    coordinates = levels * basis.value_widths.unsqueeze(2)
    values = coordinates @ basis.value_axes.mT + basis.value_origin.unsqueeze(2)
    torch.testing.assert_close((weights @ values)[1], expected[0][1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("streams", "expected"), [(1, 128), (8, 128), (16, 64), (56, 16), (2000, 1)])
def test_programs_of_the_scan_run_at_once(streams: int, expected: int) -> None:
    """Two programs of one warp in place of each program of another launch, or fewer."""
    splits = Splits.choose(streams, programs=528, most_tokens=None, estimates=False, scans_codes=True)
    assert splits.score == expected
    assert splits.score * streams <= max(1056, streams)
    assert Splits.choose(streams, programs=528, most_tokens=None, estimates=False).score <= 64


@pytest.mark.parametrize("options", CASES)
class TestKernels:
    pytestmark = INTERPRETED

    def test_scan(self, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        teach_bfloat16(monkeypatch)
        case = CodedCase(**options)
        case.launches(launch())
        basis, pages = case.exact("basis"), case.exact("pages")
        expected = reference_scan.page_log_weights(case.queries(), basis, pages, case.scale)
        stop = case.num_pages - case.recent
        scored = torch.arange(case.num_pages) < stop
        size = 1e-4 * float(expected[expected > -torch.inf].abs().max()) + 1e-5  # queries have 16 bits
        for b in range(case.batch):  # leading pages of padding are not scored
            real = (pages.scale[b] >= 0).any(-1) & scored
            logits = case.logits[b, ..., : case.num_pages].double()
            seen = real.unsqueeze(1).expand_as(logits)
            far = expected[b] - expected[b][seen].max() < -60  # beyond what float32 holds beside the largest
            off = (logits - expected[b]).abs().where(seen & ~far, torch.zeros(()).double())
            assert float(off.max()) < size
            assert bool((logits[..., :stop][~seen[..., :stop]] == -torch.inf).all())
        streams, columns = case.batch * case.num_heads, case.buffers.stats.shape[-1]
        stats = case.buffers.stats.view(streams, -1, 2, columns)[..., : case.group].double()
        lse = (stats[:, :, 0] + stats[:, :, 1].log()).logsumexp(1)
        all_pages = expected.masked_fill(~scored, -torch.inf).logsumexp(-1).flatten(0, 1)
        torch.testing.assert_close(lse, all_pages, rtol=0, atol=size)
        parts = case.scan.partials.double()
        total, power, weight = parts[..., :-2], parts[..., -2], parts[..., -1]
        assert bool(((power == power.round()) | (power == -torch.inf)).all())
        most = power.max(1).values
        share = (power - most.unsqueeze(1)).exp2()
        total = total.masked_fill(power.isneginf().unsqueeze(-1), 0.0)  # not written
        found = (total * share.unsqueeze(-1)).sum(1).unflatten(0, (case.batch, -1))
        held = (weight * share).sum(1).unflatten(0, (case.batch, -1))
        ours = case.logits[..., : case.num_pages].double().masked_fill(~case.candidates.unsqueeze(2), -torch.inf)
        weights = (ours - most.unflatten(0, (case.batch, -1)).unsqueeze(-1) * math.log(2)).exp()
        rounding = 2e-6 + 3e-7 * float(expected[expected > -torch.inf].abs().max())  # of stored logarithms
        torch.testing.assert_close(held, weights.sum(-1), rtol=rounding, atol=0)
        sums = reference_scan.coded_sum(weights, pages)
        largest = 1.5 * (weights * pages.value_scale.double().unsqueeze(2)).sum(-1, keepdim=True)
        assert float(((found - sums).abs() / largest).max()) <= rounding
        values = reference_scan.decoded_sum(sums, basis, weights.sum(-1))
        all_values = case.scan.estimate.double()
        assert torch.equal(all_values[..., -2], most)
        bound = largest * 5 * basis.value_widths.amax(-1)[..., None, None] + weights.sum(-1, keepdim=True) * 4
        off = (all_values[..., :-2].view_as(values) - values).abs()
        assert float((off / bound).max()) <= rounding

    def test_step(self, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        """All launches, against exact attention to the listed pages merged with the estimate of the other candidates."""
        teach_bfloat16(monkeypatch)
        softcap = 7.0 if options["group"] == 7 else None
        case = CodedCase(**options)
        out, read = case.launches(launch(), softcap), case.listed_pages()
        basis, pages = case.exact("basis"), case.exact("pages")
        logs = reference_scan.page_log_weights(case.queries(), basis, pages, case.scale, softcap)
        fixed = ~case.candidates & case.valid.view(case.batch, 1, -1, PAGE).any(-1)
        assert torch.equal(read & ~case.candidates, fixed)
        first, stop = case.plan[:, PlanField.FIRST], case.plan[:, PlanField.STOP]
        for b in range(case.batch):
            scored = torch.arange(case.num_pages) < stop[b]
            total = logs[b].masked_fill(~scored, -torch.inf).logsumexp(-1, keepdim=True)
            score = (logs[b] - total).exp().mean(1)
            for h in range(case.num_heads):
                chosen = read[b, h] & case.candidates[b, h]
                assert int(chosen.sum()) == case.budget
                worst, best = score[h][chosen].min(), score[h][case.candidates[b, h] & ~chosen].max()
                if best > 1e-25:  # further down, all scores are in the last bin, and may be 0
                    assert float(worst / best) > 1 - 1e-3 * max(1.0, case.spread)
                assert 0 <= int(first[b]) < int(stop[b])
        tokens = torch.arange(case.keys.shape[2])
        mask = read.repeat_interleave(PAGE, 2) & case.valid.unsqueeze(1) & (tokens < case.tokens)
        query = case.queries().unsqueeze(3)
        exact = reference.attend(
            query, case.keys.double(), case.values.double(), mask[:, :, None, None], case.scale, softcap
        )
        rest = reference_scan.estimate(logs, case.candidates & ~read, basis, pages)
        merged, lse = reference.merge_attention([exact, (rest[0].unsqueeze(3).float(), rest[1].unsqueeze(3).float())])
        assert case.spread > 1 or float((rest[1] - lse.squeeze(3)).exp().max()) > 0.05, "the estimate matters"
        expected = merged.squeeze(3).double()
        actual = out.unflatten(1, (case.num_heads, case.group)).double()
        eps = {torch.float32: 1e-3, torch.float16: 4e-3, torch.bfloat16: 2e-2}[case.dtype] * max(1.0, case.spread / 10)
        assert float((actual - expected).abs().max()) <= eps * float(expected.abs().max())


@pytest.mark.parametrize("budget", [0, 1, 140, 5000])
def test_extreme_budgets(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without selected pages everything is estimated; 140 are several tiles; a budget for all pages leaves out the scan."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("tests/gpu runs the kernels themselves")
    teach_bfloat16(monkeypatch)
    case = CodedCase(budget=budget, lengths=(600, 333), group=3)
    out, read = case.launches(launch()), case.listed_pages()
    logs = reference_scan.page_log_weights(case.queries(), case.basis, case.pages, case.scale)
    assert int((read & case.candidates).sum(-1).max()) == min(budget, int(case.candidates.sum(-1).max()))
    mask = read.repeat_interleave(PAGE, 2) & case.valid.unsqueeze(1)
    query = case.queries().unsqueeze(3).float()
    exact = reference.attend(query, case.keys, case.values, mask[:, :, None, None], case.scale)
    rest = reference_scan.estimate(logs, case.candidates & ~read, case.exact("basis"), case.pages)
    merged, _ = reference.merge_attention([exact, (rest[0].unsqueeze(3).float(), rest[1].unsqueeze(3).float())])
    expected = merged.squeeze(3).flatten(1, 2)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("dims", [(64, 128), (80, 48)])
def test_runs_of_a_tile_hold_its_summaries(dims: tuple[int, int]) -> None:
    """The bytes that the scan prefetches are those of the tile's pages, in all six arrays."""
    if sys.platform != "linux" or os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("reads addresses of the CPU")
    from tests.support.tile_runs import store_runs_kernel

    case = CodedCase(key_dim=dims[0], value_dim=dims[1], num_heads=3)
    for begin in range(0, case.num_pages - 2 * SEGMENT, 2 * SEGMENT):
        starts, sizes = (torch.zeros((case.num_heads, 32), dtype=torch.int64) for _ in range(2))
        launch()(
            store_runs_kernel, (case.num_heads,), case.layer, case.directory, starts, sizes, begin, case.num_pages,
            heads=case.num_heads, key_dim=dims[0], value_dim=dims[1], page=PAGE, unit=4, segment=SEGMENT, chunk=CHUNK,
        )  # fmt: skip
        assert not sizes[:, 12:].any()
        coded, pages = case.pages, slice(begin, begin + 2 * SEGMENT)
        units = slice(begin // 4, (begin + 2 * SEGMENT) // 4)
        arrays = (
            coded.mean[0, :, units], coded.unit[0, :, units], coded.codes[0, :, pages], coded.scale[0, :, pages],
            coded.value_codes[0, :, pages], coded.value_scale[0, :, pages],
        )  # fmt: skip
        for h in range(case.num_heads):
            for number, array in enumerate(arrays):
                runs = [ctypes.string_at(int(starts[h, i]), int(sizes[h, i])) for i in (2 * number, 2 * number + 1)]
                assert b"".join(runs) == array[h].contiguous().view(torch.uint8).numpy().tobytes()
