"""What this build costs beside another one: the same figures on both, in turn, and their ratios.

    python benchmarks/beside.py OLD_TREE                          another checkout, given as a folder
    python benchmarks/beside.py OLD_TREE --only label,lens

Each row is one function of ``ROWS``, which a process of its own runs once per turn and build: old, new, old, new. It
imports megactx from the folder of its build, and nothing but what both builds have, and prints CPU seconds of one
thread by name, or GB. Ratios are of one turn, old over new, so that what else the machine does counts in both.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

BLOCK = 32


def timed(function) -> float:
    """CPU seconds of one call."""
    began = time.process_time()
    function()
    return time.process_time() - began


def of_code(tokenizer, count: int):
    """[1, count]: source code, again and again."""
    import inspect

    import torch

    ids = torch.tensor([tokenizer(inspect.getsource(argparse), verbose=False)["input_ids"]])
    return ids.repeat(1, -(-count // ids.shape[1]))[:, :count]


def label() -> dict[str, float]:
    """A label of 16 edits of a window of 996 entries, H = 32; and a plain re-run, which is as long in both builds."""
    import torch

    from megactx.focus import moves
    from megactx.focus.sampling import draw, measured_share
    from megactx.memory import MegaContextTree
    from megactx.runtime import load_models

    try:
        from megactx.focus.edit_labels import continuation_nll, measure_values
    except ImportError:
        from megactx.focus.values import continuation_nll, measure_values

    models = load_models(device="cpu")
    base, generator = models.base, torch.Generator().manual_seed(1)
    ids = of_code(base.tokenizer, 4096 + BLOCK)
    tree, following = MegaContextTree.from_tokens(ids[:, :4096], models.gistnet, base), ids[:, 4096:]
    context = draw("random", tree, 1024, generator)
    edits = measured_share(moves(context).edits(context), 16, generator)
    edited = context.copy()
    edited.budget = 10**9
    edits[:1].apply(edited)
    continuation_nll(base, edited, following)  # a warm-up
    plain = timed(lambda: [continuation_nll(base, edited, following) for _ in range(2)]) / 2
    return {"label": timed(lambda: measure_values(base, context, edits, following)) / len(edits), "plain re-run": plain}


def stream_of(observers=(), **settings):
    """A session behind 20,000 tokens of code, W = 2,048, with the embedded models, and what comes next."""
    from megactx.runtime import Controller, Settings, load_models

    models = load_models(device="cpu")
    ids = of_code(models.base.tokenizer, 24_000)
    known = {name: value for name, value in settings.items() if hasattr(Settings(), name)}
    stream = Controller(models, Settings(2048, **known)).stream(observers=list(observers))
    stream.append(ids[:, :20_000])
    stream.logits()
    return stream, ids[:, 20_000:]


def per_token(**settings) -> tuple[float, dict[str, float]]:
    """Milliseconds of CPU time of a token over a whole reserve, eight blocks; -> all, and by part."""
    events = []
    time.perf_counter = time.process_time  # what a session tells of its parts is then CPU time too
    stream, new = stream_of([events.append], **settings)
    for place in range(BLOCK):
        stream.push(new[:, place])
    events.clear()
    count = 8 * BLOCK
    whole = timed(lambda: [stream.push(new[:, BLOCK + place]) for place in range(count)])
    parts: dict[str, float] = {}
    for event in events:
        for name, seconds in event.seconds.items():
            kind = {"decode": "decode", "read": "recompute"}.get(name, "refocus")
            parts[kind] = parts.get(kind, 0.0) + seconds / count
    read = [event for event in events if event.reused is not None]
    parts["kept"], parts["read"] = (float(sum(getattr(e, n).sum() for e in read)) for n in ("reused", "read"))
    return whole / count, parts


def session() -> dict[str, float]:
    """A token with focus, equal edits, and its parts."""
    whole, parts = per_token()
    kinds = ("decode", "refocus", "recompute")
    return {"session token": whole} | {f"session token: {kind}": parts[kind] for kind in kinds}


def mega() -> dict[str, float]:
    """A token with focus under MegaAttention, and with edits in every eighth block besides; a build without it reads
    under plain attention, with edits in every block. Columns are those of all refocuses."""
    found = {}
    for name, settings in {"": {}, ", edit_every=8": {"edit_every": 8}}.items():
        whole, parts = per_token(attention="mega", **settings)
        found |= {f"mega token{name}": whole, f"mega token{name}: recompute": parts["recompute"]}
        found |= {f"columns {kind}{name}": parts[kind] for kind in ("kept", "read")}
    return found


def batched() -> dict[str, float]:
    """A token with focus, edits in every eighth block, and edits that pay for what is read again, and both; a build
    without a setting goes on without it."""
    from megactx.focus import FocusAllocator

    paying = {"allocator": {"recompute": 1.0}} if hasattr(FocusAllocator(), "recompute") else {}
    return {
        "session token, edit_every=8": per_token(edit_every=8)[0],
        "session token, recompute=1": per_token(**paying)[0],
        "session token, both": per_token(edit_every=8, **paying)[0],
    }


def lens() -> dict[str, float]:
    """LensNet and allocator for one refocus, and 32 tokens decoded behind the window that they decide over."""
    import torch

    from megactx.focus import FocusAllocator, LensNet, moves
    from megactx.memory import MegaContextTree, WorkingContext
    from megactx.runtime import Controller, Settings, load_models

    models = load_models(device="cpu")
    ids, found = of_code(models.base.tokenizer, 20_000), {}
    tree = MegaContextTree.from_tokens(ids, models.gistnet, models.base)
    torch.manual_seed(0)
    net = LensNet(models.base.width, BLOCK).eval().requires_grad_(False)
    torch.nn.init.normal_(net.last.weight)  # edits are always due
    for budget in (512, 2048):
        context, allocator = WorkingContext.recency(tree, budget), FocusAllocator()

        def refocus(context=context, allocator=allocator):
            with torch.no_grad():
                scores = net.score(context, moves(context, allocator.protected), allocator.margin(net.tau))
            allocator.refocus(context, scores.score, scores.price)

        refocus()
        found[f"LensNet and allocator, W = {budget:,}"] = timed(lambda run=refocus: [run() for _ in range(2)]) / 2
        stream = Controller(models, Settings(budget, "recency")).stream(tree=tree)
        stream.logits()

        def decode(stream=stream):
            for place in range(BLOCK - 1):
                stream.push(ids[:, place])
                stream.logits()

        found[f"32 tokens, W = {budget:,}"] = timed(decode) * BLOCK / (BLOCK - 1)
    return found


def gist_run(*more: str) -> tuple[list[float], float, float]:
    """A run of stage gist -> CPU seconds of its steps, of its report, and GB that the process had at most by the end of
    training."""
    import resource
    import tempfile

    from megactx.framework.app import run
    from megactx.stages.gist import GistStage

    began, marks, usual, finish = [], [], GistStage.training_step, GistStage.finish

    def noted(self, *given, **named):
        began.append(time.process_time())
        return usual(self, *given, **named)

    def finished(self, *given, **named):
        marks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)
        marks.append(timed(lambda: finish(self, *given, **named)))

    GistStage.training_step, GistStage.finish = noted, finished
    short = ["preset.warmup=1", "logger=none", "preset.validation_documents=1", "preset.plateau_window=1000"]
    short += ["trainer=cpu", "trainer.precision=32-true", *more]
    if "minutes:" in Path("configs/preset/demo.yaml").read_text():
        short.append("preset.minutes=null")
    try:
        with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
            said, sys.stdout = sys.stdout, nowhere
            try:
                code = run(["experiment=demo", *short, f"folder={folder}/run"])
            finally:
                sys.stdout = said
    finally:
        GistStage.training_step, GistStage.finish = usual, finish
    assert code == 0, f"experiment=demo ended with {code}"
    return [after - before for before, after in zip(began, began[1:], strict=False)], marks[1], marks[0]


NO_REPORT = [f"stage.evaluate.{name}" for name in ("blocks=4", "copies=0", "level2=0")]


def step() -> dict[str, float]:
    """A step of experiment=demo with its control, on a CPU that has AVX2 and no bf16 units: see ``AS``; and one whose
    control an earlier run has trained, where a build can keep it."""
    import tempfile

    from megactx.stages import gist

    def median_step(*more: str) -> float:
        steps, _, memory = gist_run(f"preset.steps={STEPS}", f"preset.validate_every={STEPS}", *NO_REPORT, *more)
        peak.append(memory)
        return median(steps[2:])  # the first ones wait for memory

    peak: list[float] = []
    whole = control = both = median_step()
    if hasattr(gist, "KeptControls"):  # a build that keeps nothing does it all each time
        with tempfile.TemporaryDirectory() as place:
            gist.KeptControls = partial(gist.KeptControls, place=Path(place) / "controls")
            gist.PrefillCache = partial(gist.PrefillCache, place=Path(place) / "prefills")
            keep, prefills = "stage.keep_controls=true", "stage.prefills.gigabytes=1"
            median_step(keep)
            assert list(Path(place).rglob("*.safetensors")), "the control was not kept"
            control = median_step(keep)
            median_step(keep, prefills)  # which is another recipe: a teacher in 16 bit
            both = median_step(keep, prefills)
    return {
        "a step of the demo, AVX2, fp32": whole,
        "the same, its control kept": control,
        "the same, its documents kept too": both,
        "peak memory of a step": peak[0],
    }


def report() -> dict[str, float]:
    """The report of experiment=demo, of fewer blocks, on a CPU as of ``step``; and what the process had at most."""
    import resource

    sizes = [f"stage.evaluate.{name}" for name in ("blocks=400", "copies=16", "level2=8")]
    _, seconds, _ = gist_run("preset.steps=1", "preset.warmup=0", "preset.validate_every=1", *sizes)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {"report of 400 blocks": seconds, "peak memory of that": peak}


def smollm2() -> dict[str, float]:
    """A step of 32 blocks of 2 x 1,024 tokens on SmolLM2 with its control, in fp32, on the folder that `make smollm2`
    has made."""
    from megactx.data.documents import cache_folder

    (folder,) = cache_folder().glob("gguf-*")
    sizes = [f"preset.{name}" for name in ("steps=3", "validate_every=3", "min_tokens=1024", "max_tokens=1024")]
    steps, _, _ = gist_run(f"base.name={folder}", *sizes, "gistnet.num_heads=8", *NO_REPORT)
    return {"a step on SmolLM2, fp32": min(steps)}


def packed() -> dict[str, float]:
    """A block of the packed pass, and of the loop over the teacher's cached prefix that each build has, T = 4,096."""
    sys.path.insert(0, str(Path.cwd() / "benchmarks"))
    from substitution import bench

    from megactx.lm import BaseLM

    base, found = BaseLM.from_pretrained("asset:tiny-base", "float32").freeze(), {}
    for horizon in (32, 128):
        speed = bench(base, 4096, horizon)["spans_per_second"]
        found |= {f"{name}, H = {horizon}": 1 / speed[own] for name, own in (("packed", "packed"), ("loop", "prefix"))}
    return found


def help_page() -> dict[str, float]:
    """The answer of the command line, a process with its start."""

    def asked(*given: str) -> None:
        subprocess.run([sys.executable, "train.py", *given], capture_output=True, check=True)

    found = {}
    for given in (["--help"], ["--cfg", "job"]):
        asked(*given)
        before = os.times()
        asked(*given)
        after = os.times()
        spent = after.children_user + after.children_system - before.children_user - before.children_system
        found[f"train.py {' '.join(given)}"] = spent
    return found


STEPS = 7
# name -> what a process measures for it: seconds by name.
ROWS = {"label": label, "session": session, "batched": batched, "mega": mega, "lens": lens}
ROWS |= {"step": step, "report": report, "packed": packed, "help": help_page, "smollm2": smollm2}
# name -> variables under which it runs: a plain CPU, where this one has more.
PLAIN = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
AS = {row: PLAIN | {"MEGACTX_CPU_BF16": "none"} for row in ("step", "report", "smollm2")}
# name -> two figures of the same build, of which one is a share or a multiple of the other
SHARES = {
    "columns kept / columns read": ("columns kept", "columns read"),
    "columns kept / columns read, edit_every=8": ("columns kept, edit_every=8", "columns read, edit_every=8"),
    "plain re-run / label": ("plain re-run", "label"),
    "loop / packed, H = 32": ("loop, H = 32", "packed, H = 32"),
    "loop / packed, H = 128": ("loop, H = 128", "packed, H = 128"),
    "LensNet and allocator / 32 tokens, W = 512": ("LensNet and allocator, W = 512", "32 tokens, W = 512"),
    "LensNet and allocator / 32 tokens, W = 2,048": ("LensNet and allocator, W = 2,048", "32 tokens, W = 2,048"),
}


def measured(tree: Path, row: str) -> dict[str, float]:
    """One row on one build, in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment |= AS.get(row, {})
    command = [sys.executable, str(Path(__file__).resolve()), str(tree), "--row", row]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{row} on {tree} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def spread(values: list[float], scale: float = 1.0) -> str:
    """min / median / max."""
    return " / ".join(f"{scale * value:.3g}" for value in (min(values), median(values), max(values)))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("old", type=Path, help="folder of the other checkout")
    parser.add_argument("--only", help=f"some of {','.join(ROWS)}")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/beside.json"))
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.row:
        import torch

        torch.set_num_threads(1)
        print(json.dumps(ROWS[args.row]()))
        return 0
    builds = {"old": args.old.resolve(), "new": Path(__file__).resolve().parents[1]}
    wanted = args.only.split(",") if args.only else list(ROWS)
    if wrong := [name for name in wanted if name not in ROWS]:
        parser.error(f"--only={','.join(wrong)} is not known, allowed are {', '.join(ROWS)}")
    if not (builds["old"] / "megactx").is_dir():
        parser.error(f"old={args.old} holds no megactx")
    found = {build: {} for build in builds}
    for turn in range(args.turns):
        for row in wanted:
            for build, tree in builds.items():
                for name, seconds in measured(tree, row).items():
                    found[build].setdefault(name, []).append(seconds)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(found, indent=1))  # what is there, should it be stopped
            print(f"turn {turn + 1}, {row}", file=sys.stderr)
    print(f"{'min / median / max of ' + str(args.turns):48}{'old, ms or MB':>24}{'new, ms or MB':>24}{'old / new':>22}")
    for name, old in found["old"].items():
        new = found["new"][name]
        ratios = [a / b for a, b in zip(old, new, strict=True)]
        print(f"{name:48}{spread(old, 1e3):>24}{spread(new, 1e3):>24}{spread(ratios):>22}")
    for name, (above, below) in SHARES.items():
        if above in found["old"]:
            shares = [[a / b for a, b in zip(f[above], f[below], strict=True)] for f in found.values()]
            print(f"{name:48}{spread(shares[0]):>24}{spread(shares[1]):>24}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
