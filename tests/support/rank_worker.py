"""What each process of `ranks.py` does: joins the process group, calls a case, sends back what it returns or raises."""

from __future__ import annotations

import faulthandler
import os
import shutil
import traceback
from datetime import timedelta
from importlib.util import find_spec
from typing import Any


def work(connection: Any, number: int, backend: str, device: str) -> None:
    """Answer calls until the connection is closed. `backend` and `device` as for `RankPool`."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
        "RANK": str(number), "LOCAL_RANK": str(number), "NCCL_GRAPH_MIXING_SUPPORT": "0",
        "NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    }  # fmt: skip
    if shutil.which("nvidia-smi") is None:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    faulthandler.enable()
    import torch
    import torch.distributed as dist

    from tests.support.interpreter import quicken
    from tests.support.rank_cases import CASES, forget_models
    from tests.support.ranks import Raised
    from tests.support.tuning import tuned

    if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None:
        quicken()
    torch.set_num_threads(1)
    if device != "cpu":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    joined = ""
    while True:
        try:
            size, store, tuning, case, arguments = connection.recv()
        except (EOFError, OSError):
            return
        try:
            if store != joined:
                if joined:
                    forget_models()
                    dist.destroy_process_group()
                os.environ["WORLD_SIZE"] = os.environ["LOCAL_WORLD_SIZE"] = str(size)
                dist.init_process_group(
                    backend, init_method=f"file://{store}", rank=number, world_size=size, timeout=timedelta(seconds=240)
                )
                joined = store
            torch.manual_seed(0)
            with tuned(**tuning):
                found = CASES[case](*arguments)
            connection.send(found)
        except Exception as error:
            attributes = {name: value for name, value in vars(error).items() if isinstance(value, (int, type(None)))}
            connection.send(Raised(type(error).__name__, str(error), attributes, traceback.format_exc()))
