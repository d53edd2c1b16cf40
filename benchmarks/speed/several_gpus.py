"""Models on several GPUs, tested, then timed, in one command: `python -m benchmarks.speed.several_gpus --gpus 2 --test`.

    --shape llama-8b | llama-70b     random weights, bf16 (`tiny`: float32, for a check of this script)
    --tokens 32768 131072            contexts
    --ways tp one map                a rank on each GPU; one GPU; one process with `device_map` over all of them
    --rows spin "dense graph" ...    only these rows (see `rank_rows.py`)
    --test                           first runs the tests that need several GPUs: `pytest -m gpu`
    --seconds 540                    for all of it: what is not measured by then is left out, and the file says so
    --device cpu                     ranks on the CPU over gloo, to check this script
    --output FILE                    default: benchmarks/results/several-gpus-<shape>-x<gpus>.json

Each way runs in processes of its own, which add their rows to a file as they come. A process that hangs is ended when its time
is over, and its rows stay. `ratios` has tp's time per token over one GPU's, and DynamicCache's over SpinCache's, of one way.
NVLink multicast is off, and NCCL is told that graphs and other launches do not overlap.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.campaign import about
from benchmarks.common.record import RESULTS
from benchmarks.speed.rank_rows import ROWS, SEVERAL_GPU_SHAPES, run_way

TESTS = ("tests/gpu/test_ranks.py", "tests/gpu/test_device_maps.py")
TEST_SECONDS = 200.0
WAYS = ("tp", "one", "map")
SHARES = {"tp": 0.5, "one": 0.55, "map": 1.0}
"""Of the time that is left, how much a way may take."""
ENVIRONMENT = {
    "NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NCCL_GRAPH_MIXING_SUPPORT": "0",
    "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
}  # fmt: skip


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--shape", choices=SEVERAL_GPU_SHAPES, default="llama-8b")
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--test", action="store_true")
    parser.add_argument("--seconds", type=float, default=540.0)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def run_tests(seconds: float) -> dict[str, Any]:
    """The outcome of the tests that need several GPUs."""
    files = [file for file in TESTS if Path(file).exists()]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-n", "0", "-rs", *files]
    started = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | ENVIRONMENT, start_new_session=True
    )
    try:
        text, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the ranks
        text, _ = process.communicate()
    code = process.returncode
    print(text, flush=True)
    counted = {what: int(count) for count, what in re.findall(r"(\d+) (passed|failed|skipped|error)", text)}
    tail = [line for line in text.splitlines() if line.startswith(("FAILED", "ERROR", "SKIPPED"))]
    return {
        "files": files,
        "exit_code": code,
        "seconds": round(time.monotonic() - started, 1),
        **counted,
        "lines": tail,
    }


def measure(given: argparse.Namespace, way: str, deadline: float, rows: Path) -> dict[str, Any]:
    """Run the processes of one way until the deadline. Returns how they ended."""
    size = given.gpus if way == "tp" else 1
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(size):
        facts = {"way": way, "rank": rank, "size": size, "rows": str(rows), "seconds": deadline - time.monotonic() - 5}
        environment = os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "4")}
        if way == "tp":
            environment |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
        if way == "one" and given.device == "cuda":
            environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        command = [sys.executable, "-m", "benchmarks.speed.several_gpus", *_same(given), "--worker", json.dumps(facts)]
        processes.append(subprocess.Popen(command, env=environment, start_new_session=True))
    started, ended = time.monotonic(), "in time"
    while any(process.poll() is None for process in processes):
        if any(process.poll() not in (None, 0) for process in processes):
            ended = "a process failed"
            time.sleep(5)
        elif time.monotonic() < deadline:
            time.sleep(0.2)
            continue
        else:
            ended = "stopped at the end of its time"
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        break
    codes = [process.wait() for process in processes]
    return {"way": way, "ended": ended, "exit_codes": codes, "seconds": round(time.monotonic() - started, 1)}


def _same(given: argparse.Namespace) -> list[str]:
    """The options that processes get too."""
    tokens = [str(count) for count in given.tokens]
    return [
        "--gpus", str(given.gpus), "--shape", given.shape, "--device", given.device, "--budget", str(given.budget),
        "--tokens", *tokens, "--rows", *given.rows,
    ]  # fmt: skip


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Quotients of times per token."""
    times = {(row["way"], row["tokens"], row["row"]): row["tpot_ms"] for row in rows if row.get("tpot_ms")}
    found = []
    for (way, tokens, name), took in times.items():
        if name != "spin":
            continue
        made: dict[str, Any] = {"way": way, "tokens": tokens}
        for other in ("dynamic", "dense graph"):
            if (way, tokens, other) in times:
                made[f"{other} / spin"] = round(times[way, tokens, other] / took, 2)
        if way != "one" and ("one", tokens, "spin") in times:
            made["of one GPU"] = round(took / times["one", tokens, "spin"], 3)
        found.append(made)
    return found


def write(output: Path, content: dict[str, Any]) -> None:
    """Write the file; under another name first, so that it is always whole."""
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_suffix(".part")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    unfinished.replace(output)


def main() -> None:
    """Test, measure, and write the file."""
    started, given = time.monotonic(), parse()
    if given.worker is not None:
        run_way(given, **given.worker)
        return
    if given.device == "cuda" and torch.cuda.device_count() < given.gpus:
        sys.exit(f"expected {given.gpus} GPUs, found {torch.cuda.device_count()}; pass --gpus, or --device cpu")
    output = given.output or RESULTS / f"several-gpus-{given.shape}-x{given.gpus}.json"
    rows = Path(tempfile.mkdtemp()) / "rows.jsonl"
    rows.touch()
    command = "python -m benchmarks.speed.several_gpus " + " ".join(_same(given))
    content: dict[str, Any] = {
        **about(given.shape, given.budget), "gpus": given.gpus, "device": given.device, "command": command,
        "environment": ENVIRONMENT, "tests": None, "ways": [], "rows": [], "ratios": [],
    }  # fmt: skip
    end = started + given.seconds - 5
    if given.test:
        content["tests"] = run_tests(min(TEST_SECONDS, end - time.monotonic()))
        write(output, content)
    for way in given.ways:
        left = end - time.monotonic()
        if left < 20:
            content["ways"].append({"way": way, "ended": "no time left"})
            continue
        share = 1.0 if way == given.ways[-1] else SHARES[way]
        content["ways"].append(measure(given, way, time.monotonic() + left * share, rows))
        content["rows"] = [json.loads(line) for line in rows.read_text().splitlines()]
        content["ratios"] = ratios(content["rows"])
        write(output, content)
    content["seconds"] = round(time.monotonic() - started, 1)
    write(output, content)
    print(json.dumps({name: content[name] for name in ("tests", "ways", "ratios")}, indent=1), flush=True)


if __name__ == "__main__":
    main()
