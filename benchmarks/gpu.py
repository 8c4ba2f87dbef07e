"""Everything that is promised of a CUDA card, in one call of under eight minutes, each figure beside its goal.

    python benchmarks/gpu.py                      on a card
    python benchmarks/gpu.py --miniature          on any machine: do all of the parts run? Its figures say nothing

Each part is one of the other benchmarks, run as a process of its own with the sizes of the goals; a part that fails or
runs out of time is told, and the others run all the same. ``docs/gpu.md`` is written anew by a run on a card, with card
and commit: what no card has ever measured stands there as such, in this one place. The exit code is 3 where a part
fails and 1 where a goal is missed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "gpu.md"
SMALL = ["--cpu", "--layers", "2", "--width", "64", "--vocabulary", "512"]
STEP = ["--shapes", "smollm2", "--cpu", "--layers", "1", "--tokens", "128", "--spans", "1", "--steps", "1"]
SLOW = 5  # times the seconds, in miniature on a busy CPU


@dataclass
class Part:
    """A benchmark, its arguments on a card and in miniature, and the seconds that it may take."""

    script: str
    card: list[str]
    miniature: list[str]
    seconds: int


@dataclass
class Figure:
    """A number of a part's file: what it is, where it stands, the goal if there is one, how it is printed."""

    what: str
    part: str
    value: Callable[[dict], float | None]
    least: float | None = None
    most: float | None = None
    form: str = ".1f"

    @property
    def goal(self) -> str:
        if self.least is not None:
            return f"at least {self.least:{self.form}}"
        return "" if self.most is None else f"at most {self.most:{self.form}}"

    def reached(self, value: float) -> bool:
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)


PARTS = {
    "packed": Part(
        "substitution.py",
        ["--horizons", "32", "--dtype", "bfloat16", "--compile"],
        ["--horizons", "32", "--tokens", "256", "--cpu", "--compile"],
        85,
    ),
    "encode": Part("encode.py", ["--matmul"], ["--matmul", "--widths", "64"], 60),
    "step 135M": Part("shapes.py", ["--shapes", "smollm2", "--tokens", "2048", "--batch", "8"], STEP, 60),
    "step 3B": Part("shapes.py", [], STEP, 90),
    "refocus": Part(
        "focus.py",
        ["--shapes", "smollm3", "--tokens", "--windows", "2048", "8192"],
        ["--shapes", "smollm3", "--tokens", "--windows", "128", *SMALL],
        90,
    ),
    "first token": Part(
        "runtime.py",
        ["--shapes", "smollm3", "--lengths", "--prompts", "8192", "32768", "131072"],
        ["--shapes", "smollm3", "--lengths", "--prompts", "2048", "4096", "--budget", "1024", *SMALL],
        90,
    ),
}


def refocus(found: dict, window: int) -> float | None:
    rows = [row for row in found["refocusing"] if row["window"] == window]
    return 100 * rows[0]["share_of_decoding"]["refocus"] if rows else None


def graphs(found: dict, window: int) -> float | None:
    rows = [row for row in found["refocusing"] if row["window"] == window]
    return rows[0]["graph_times_faster"] if rows else None


def times_faster(found: dict, kind: str) -> float | None:
    rows = [row for row in found["until_first"] if row["tokens"] == 32_768]
    return (rows[0]["full"] or rows[0]["full_fit"]) / rows[0][kind] if rows else None


FIGURES = [
    Figure(
        "packed pass over a loop of full forwards, T = 4,096, H = 32",
        "packed",
        lambda f: f["rows"][0]["ratio"]["full"],
        least=60,
    ),
    Figure(
        "the packed pass with its decoder compiled (torch.compile), times faster",
        "packed",
        lambda f: f["rows"][0]["compiled_times_faster"],
        form=".2f",
    ),
    Figure(
        "GistNet's encode, % of its own matrix products in bf16",
        "encode",
        lambda f: 100 * min(row["share"] for row in f["matmul"] if row["dtype"] == "bfloat16"),
        least=60,
        form=".0f",
    ),
    Figure("blocks a second in training, shapes of SmolLM2-135M", "step 135M", lambda f: f["spans_per_second"]),
    Figure("MFU of it, %", "step 135M", lambda f: f["mfu"] and 100 * f["mfu"], form=".0f"),
    Figure("blocks a second in training, shapes of SmolLM3-3B, T = 16,384", "step 3B", lambda f: f["spans_per_second"]),
    Figure("MFU of it, %", "step 3B", lambda f: f["mfu"] and 100 * f["mfu"], form=".0f"),
    Figure(
        "memory of it, % away from the estimate",
        "step 3B",
        lambda f: 100 * abs(f["peak"] / f["expected"] - 1),
        most=10,
        form=".0f",
    ),
    Figure(
        "a refocus, % of decoding 32 tokens, SmolLM3-3B shapes, W = 2,048",
        "refocus",
        lambda f: refocus(f, 2048),
        most=3,
    ),
    Figure("the same, W = 8,192", "refocus", lambda f: refocus(f, 8192)),
    Figure("decoding over it as one CUDA graph, times faster, W = 2,048", "refocus", lambda f: graphs(f, 2048)),
    Figure("the same, W = 8,192", "refocus", lambda f: graphs(f, 8192)),
    Figure(
        "first token behind 32,768, cold, times faster than full attention",
        "first token",
        lambda f: times_faster(f, "cold"),
        least=12,
    ),
    Figure("the same, warm", "first token", lambda f: times_faster(f, "warm"), least=40),
    Figure("prompt from which cold is faster, tokens", "first token", lambda f: f["crossover"], form=",.0f"),
]


def measure(part: Part, miniature: bool, folder: Path) -> dict | str:
    """-> the part's file, or in one line why there is none."""
    out, limit = folder / "out.json", part.seconds * (SLOW if miniature else 1)
    command = [
        sys.executable,
        str(HERE / part.script),
        *(part.miniature if miniature else part.card),
        "--out",
        str(out),
    ]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"not done after {limit} s"
    if not out.exists():
        return (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
    found = json.loads(out.read_text())
    out.unlink()
    if not miniature and found["accelerator"] != "cuda":
        return f"measured on {found['accelerator']}, not on a card"
    return found


def rows(found: dict[str, dict | str]) -> list[tuple[str, str, str, bool | None]]:
    """What, goal, measured, and whether the goal is reached; ``None``: there is no goal or no figure."""
    table = []
    for figure in FIGURES:
        part = found.get(figure.part, "never measured on a card")
        value = None if isinstance(part, str) else figure.value(part)
        said = part if isinstance(part, str) else "-" if value is None else f"{value:{figure.form}}"
        judged = figure.reached(value) if figure.goal and value is not None else None
        table.append((figure.what, figure.goal, said, judged))
    return table


def page(found: dict, about: str) -> str:
    """``docs/gpu.md``."""
    lines = [
        "# What a card was asked for",
        "",
        "Written by `python benchmarks/gpu.py`, which measures all of it in one call. " + about,
        "",
        "| figure | goal | measured |",
        "|---|---|---|",
    ]
    for what, goal, said, judged in rows(found):
        verdict = {None: "", True: "", False: " (missed)"}[judged]
        lines.append(f"| {what} | {goal} | {said}{verdict} |")
    return "\n".join(lines) + "\n" + BESIDE


# What the table does not say: written by hand.
BESIDE = f"""
On a card its parts may take {sum(part.seconds for part in PARTS.values())} s in all.
With `--miniature` every part runs on a CPU too; those figures say nothing.

## What tests check on a card

`python -m pytest tests/gpu -m ""`. All of it passes on a CPU, and none of it has run on CUDA yet:

- The packed pass and its gradient are those of a loop of plain passes, in fp32 and bf16.
- Keys and values are read alike in one group and in several; scores in chunks and their gradient are those of all.
- A step of the demo in bf16-mixed moves every net, and not the base.
- A step asks the device for numbers as often with many blocks as with few; on CUDA at most once, by the profiler.
- The decoder of the packed pass is one graph for `torch.compile`, without a break.
- Tokens that are decoded at fixed shapes, as one CUDA graph, have the states of passes that grow; nothing of them asks
  the device for a number.
- `flex_attention` under MegaAttention's rule is attention under the dense mask.
- `trainer=fsdp` with two processes learns what one learns. One card has one process: NCCL takes no two on a card.

## What is not there

- Two hosts with cards, NCCL between them: never tried. Two hosts are tested on CPUs, with gloo: [hosts.md](hosts.md).
"""

NEVER = "No run of it has been on a card yet: none of these figures is known, and none is claimed."


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--miniature", action="store_true", help="small sizes, no page")
    given = parser.parse_args(arguments)
    if not given.miniature and not torch.cuda.is_available():
        print("gpu.py: there is no CUDA card here; --miniature tries all of the parts", file=sys.stderr)
        return 2
    found, began = {}, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for name, part in PARTS.items():
            print(f"{time.monotonic() - began:5.0f} s  {name}", flush=True)
            found[name] = measure(part, given.miniature, Path(folder))
    table = Table("figure", "goal", "measured", title="in miniature: figures say nothing" if given.miniature else None)
    measured = rows(found)
    for what, goal, said, judged in measured:
        verdict = {None: "", True: " reached", False: " MISSED"}[None if given.miniature else judged]
        table.add_row(what, goal, said + verdict)
    Console(width=140).print(table)
    if not given.miniature:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE)
        PAGE.write_text(page(found, f"{torch.cuda.get_device_name()}, commit {commit.stdout.strip() or 'unknown'}."))
    if any(isinstance(part, str) for part in found.values()):
        return 3
    return 0 if given.miniature else int(any(judged is False for *_, judged in measured))


if __name__ == "__main__":
    sys.exit(main())
