"""A tree of a hundred million tokens on disk: opening, saving, opening blocks, a session over it, kills.

    python benchmarks/storage.py [--tokens 100000000] [--old FOLDER] [--folder DIR]

The encoder is synthetic: tokens and gists (d 576, fp16) are random. So pages and their bytes are those of a real tree
of that width. The base LM is a small Llama of width 576 with random weights, and so is
LensNet (without mean embeddings). Every row runs in a process of its own, on one thread.

    open       seconds and resident bytes from a process that has imported the package and loaded the base to the first
               window with its embeddings; the system has dropped the tree's files from its cache (posix_fadvise).
               ``saved window``: of the session that was saved; ``cold start``: a new one by recency. Median of three
    save       bytes that the process writes (/proc/self/io) for a session that has 32 more tokens; 30 times
    blocks     what a refocus waits for that opens 2 blocks and 2 gists of 1,024 tokens of which nothing is in memory,
               neither in the tree nor in the system; 200 times, ms
    session    time per token over the tree on disk, over that of the same session over the tree in memory, block by
               block in turn; both must write the same tokens. Median of the ratios
    kills      a writer that appends and saves is killed at a random moment, 200 times: each time the tree opens, has
               all that was saved before, and every page of it is whole

``--old`` names another checkout (a folder), whose tree of a tenth of the tokens is opened and saved in the same run,
beside one of this build. The run ends with 1 where a goal is missed.
"""

import argparse
import copy
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BLOCK, WIDTH, VOCABULARY, BUDGET = 32, 576, 8_192, 512
PIECE, POOL = 2**18, 2**14
TRIES = 10_000  # to find a block that is not in memory
GOALS = {  # what is measured: (at most, unit)
    "open, saved window: s": 1.0,
    "open, saved window: MB": 200.0,
    "open, cold start: s": 1.0,
    "open, cold start: MB": 200.0,
    "save 32 more tokens: MB": 1.0,
    "blocks not in memory, p99: ms": 20.0,
    "session, disk over memory: x": 1.1,
    "kills that lost something": 0.0,
}


class Mean:
    """32 vectors -> their mean, in fp16."""

    block_size, width = BLOCK, WIDTH

    def encode_block(self, embeddings, seen=None):  # [E, K, D] -> [E, D]
        return embeddings.mean(1).half()

    encode_span = encode_block  # as earlier builds call it

    def offset_in(self, tokens: int) -> int:
        return tokens - 1

    def spread(self, lods):
        return None


def grown(base, tokens: int, own: bool = False):
    """A tree of random tokens and gists. Its pages are slices of one pool, so that it takes little memory; ``own``:
    copies of them, for a build that writes all pages in one file and takes no shared ones."""
    import torch

    from megactx.memory import MegaContextTree

    generator = torch.Generator().manual_seed(0)
    pools = {
        "token": torch.randint(5, VOCABULARY, (1, 2 * PIECE), generator=generator, dtype=torch.int32),
        "gist": torch.randn(1, 2 * POOL, WIDTH, generator=generator).half() * 0.05,
    }
    tree, lod, count = MegaContextTree(Mean(), base, dtype=torch.float16), 0, tokens
    while count:
        level = tree.levels[lod] if lod == 0 else tree.new_level()
        for first in range(0, count, level.size):
            used, page = min(level.size, count - first), {}
            for name, (shape, dtype) in level.columns.items():
                if name in pools:
                    at = int(torch.randint(pools[name].shape[1] // 2, (), generator=generator))
                    page[name] = pools[name][:, at : at + used].clone() if own else pools[name][:, at : at + used]
                else:
                    page[name] = torch.zeros(1, used, *shape, dtype=dtype)
            level.put_page(page)
        level.lengths = torch.tensor([count])
        lod, count = lod + 1, count // BLOCK
    return tree


def base_of(folder: Path):
    from megactx import BaseLM

    return BaseLM.from_pretrained(str(folder), "float32").freeze()


def make_base(folder: Path) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from megactx.assets import resolve

    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 1_536, "num_hidden_layers": 4, "num_attention_heads": 9}
    config = LlamaConfig(
        **sizes, num_key_value_heads=3, vocab_size=VOCABULARY, max_position_embeddings=8_192, tie_word_embeddings=True
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve("asset:tiny-base")).save_pretrained(folder)


def controller(base, kind: str):
    import torch

    from megactx import LensNet
    from megactx.parts.models import Models
    from megactx.runtime import Controller, Settings

    torch.manual_seed(0)
    lens = LensNet(WIDTH, content=False).eval().requires_grad_(False) if kind == "focus" else None
    return Controller(Models(base, Mean(), lens), Settings(budget=BUDGET, megacontext=kind))


def session_of(control, tree):
    from megactx.runtime import Session

    session = Session.__new__(Session)
    session._begin(control, control.stream(tree=tree), {})
    return session


def written() -> int:
    return int(Path("/proc/self/io").read_text().split("\nwrite_bytes: ")[1].split()[0])


def drop(folder: Path, sync: bool = True) -> None:
    """The system forgets what it holds of the files."""
    if sync:
        os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def build(place: Path, tokens: int, blocks: int = 12) -> dict:
    """The tree, the session that is saved, and the same session over the tree in memory and on disk."""
    import torch

    from megactx.memory import MegaContextTree

    make_base(place / "base")
    base = base_of(place / "base")
    began = time.perf_counter()
    tree = grown(base, tokens)
    made = time.perf_counter() - began
    memory = copy.copy(tree)  # before a save gives it a home on disk
    memory.levels = [copy.copy(level) for level in tree.levels]
    for level in memory.levels:
        level.pages, level.dirty = [dict(page) for page in level.pages], set()
    control = controller(base, "focus")
    session = session_of(control, tree)
    _ = session.context
    began = time.perf_counter()
    session.save(place / "session")
    saved = time.perf_counter() - began
    session.close()
    size = sum(path.stat().st_size for path in (place / "session").rglob("*") if path.is_file())
    size /= tree.bytes()
    del session, tree
    # Beside the one in memory: a copy of it, opened.
    disk = MegaContextTree.load(place / "session" / "tree", Mean(), base)
    sessions = [session_of(control, memory), session_of(control, disk)]
    ratios, texts = [], [[], []]
    with torch.no_grad():
        for turn in range(blocks):
            times = [0.0, 0.0]
            for which in (0, 1) if turn % 2 else (1, 0):
                began = time.perf_counter()
                texts[which] += [piece.token for piece in sessions[which].generate(BLOCK)]
                times[which] = time.perf_counter() - began
            ratios.append((times[1] / times[0], times[0] / BLOCK * 1e3))
    ratios = ratios[2:]  # the first reads all of the window
    return {
        "made s": made,
        "saved s": saved,
        "file over bytes": size,
        "same tokens": texts[0] == texts[1],
        "ms per token in memory": statistics.median(each for _, each in ratios),
        "session, disk over memory: x": statistics.median(ratio for ratio, _ in ratios),
        "pages": disk.cache.counts,
    }


def opened(place: Path, kind: str) -> dict:
    import psutil
    import torch

    from megactx.memory import MegaContextTree, WorkingContext
    from megactx.runtime import Session

    torch.set_num_threads(1)
    base = base_of(place / "base")
    control = controller(base, "focus")
    base.embed(torch.zeros(1, BLOCK, dtype=torch.long))
    drop(place / "session")
    process = psutil.Process()
    before, began = process.memory_info().rss, time.perf_counter()
    if kind == "saved window":
        context = Session.load(place / "session", control).context
    else:
        context = WorkingContext.recency(MegaContextTree.load(place / "session" / "tree", Mean(), base), BUDGET)
    context.to_tensor()
    seconds = time.perf_counter() - began
    return {f"open, {kind}: s": seconds, f"open, {kind}: MB": (process.memory_info().rss - before) / 1e6}


def blocks(place: Path, times: int = 200) -> dict:
    import torch

    from megactx.memory import MegaContextTree, WorkingContext

    torch.set_num_threads(1)
    base, rng, found = base_of(place / "base"), random.Random(0), []
    tree = MegaContextTree.load(place / "session" / "tree", Mean(), base)
    WorkingContext.recency(tree, BUDGET).to_tensor()
    for _ in range(times):
        while not all(future.done() for future in tree.cache.coming.values()):
            time.sleep(0.01)
        drop(place / "session", sync=False)
        nodes = []
        for lod, count in ((1, 2), (2, 2)):  # what is opened; its children are read
            for _ in range(TRIES):
                if not count:
                    break
                node = rng.randrange(1, int(tree.counts(lod)))
                level = tree.levels[lod - 1]
                if not level.pages[node * BLOCK // level.size]:
                    nodes += [(lod - 1, node * BLOCK + child) for child in range(BLOCK)]
                    count -= 1
            if count:
                raise SystemExit(f"of level {lod - 1} no page was found that is not in memory: take more --tokens")
        lod, index = torch.tensor(nodes).unbind(1)
        began = time.perf_counter()
        assert tree.usable(torch.zeros_like(lod), lod, index).all()
        tree.embeddings(torch.zeros_like(lod), lod, index)
        found.append((time.perf_counter() - began) * 1e3)
    found.sort()
    return {
        "blocks not in memory, p50: ms": statistics.median(found),
        "blocks not in memory, p99: ms": found[int(times * 0.99)],
    }


def saves(place: Path, times: int = 30) -> dict:
    import torch

    from megactx.runtime import Session

    torch.set_num_threads(1)
    session = Session.load(place / "session", controller(base_of(place / "base"), "focus"))
    session.append([5] * BLOCK, score=True)
    session.save()
    found, seconds = [], []
    for step in range(times):
        session.append([6 + step] * BLOCK, score=True)
        before, began = written(), time.perf_counter()
        session.save()
        seconds.append(time.perf_counter() - began)
        found.append((written() - before) / 1e6)
    return {
        "save 32 more tokens: MB": max(found),
        "save 32 more tokens, median: MB": statistics.median(found),
        "save 32 more tokens, median: s": statistics.median(seconds),
    }


def kills(place: Path, times: int) -> dict:
    import torch

    from megactx.memory import MegaContextTree, storage

    torch.set_num_threads(1)
    base, rng, folder, lost = base_of(place / "base"), random.Random(0), place / "killed", 0
    grown(base, 300_000 // BLOCK * BLOCK).save(folder)
    length = 300_000 // BLOCK * BLOCK
    began, clock = length, time.perf_counter()
    MegaContextTree.load(folder, Mean(), base).save(folder)
    usual = time.perf_counter() - clock
    for _ in range(times):
        child = os.fork()
        if child == 0:
            try:
                tree = MegaContextTree.load(folder, Mean(), base)
                while True:
                    tree.append(torch.full((1, BLOCK), int(tree.lengths[0]) // BLOCK % VOCABULARY))
                    tree.save(folder)
            finally:
                os._exit(1)
        time.sleep(rng.uniform(0.5, 4) * usual)
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, "the writer failed by itself"
        tree = MegaContextTree.load(folder, Mean(), base)
        now = int(tree.lengths[0])
        new = tree.levels[0].span("token", began, now)[0].view(-1, BLOCK)
        whole = (new == (torch.arange(began, now, BLOCK) // BLOCK % VOCABULARY)[:, None]).all()
        lost += now < length or not whole or bool(storage.damaged(folder))
        length = now
    return {"kills that lost something": lost, "kills": times, "blocks saved between": (length - began) // BLOCK}


def alone(place: Path, tokens: int) -> dict:
    """A tree alone, by what both builds have: opening to a window, and a save of 32 more tokens."""
    import psutil
    import torch

    from megactx.memory import MegaContextTree, WorkingContext

    torch.set_num_threads(1)
    base = base_of(place / "base")
    folder = place / f"alone-{os.getpid()}"
    if tokens:
        grown(base, tokens, own=True).save(folder)
        drop(folder)
        return {"folder": str(folder)}
    folder = Path(os.environ["TREE"])
    process = psutil.Process()
    before, began = process.memory_info().rss, time.perf_counter()
    tree = MegaContextTree.load(folder, Mean(), base)
    WorkingContext.recency(tree, BUDGET).to_tensor()
    seconds, resident = time.perf_counter() - began, (process.memory_info().rss - before) / 1e6
    tree.append(torch.full((1, BLOCK), 7))
    before, began = written(), time.perf_counter()
    tree.save(folder)
    return {
        "open: s": seconds,
        "open: MB": resident,
        "save: MB": (written() - before) / 1e6,
        "save: s": time.perf_counter() - began,
    }


ROLES = {"build": build, "opened": opened, "blocks": blocks, "saves": saves, "kills": kills, "alone": alone}


def process(role: str, *arguments, package: Path | None = None, **variables) -> dict:
    """A role in a process of its own, from the package of this checkout or of another."""
    package = package or Path(__file__).resolve().parent.parent
    environment = os.environ | variables | {"PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--role", role, *map(str, arguments)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, cwd=package)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=100_000_000)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--old", type=Path, help="another checkout")
    parser.add_argument("--folder", type=Path, help="where 5 GB are written, and removed at the end")
    parser.add_argument("--role", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role:
        role, place, *rest = arguments.role
        print(json.dumps(ROLES[role](Path(place), *(int(r) if r.isdigit() else r for r in rest))))
        return 0
    place, found, opens = Path(tempfile.mkdtemp(dir=arguments.folder)), {}, {}
    need = arguments.tokens * 60
    if shutil.disk_usage(place).free < need:
        print(f"{place} has less than {need / 1e9:.0f} GB of room; --folder names another place")
        return 2
    try:
        for role, *rest in (
            ("build", arguments.tokens),
            *[("opened", kind) for kind in ("saved window", "cold start") for _ in range(3)],
            ("blocks",),
            ("saves",),
            ("kills", arguments.kills),
        ):
            row = process(role, place, *rest)
            if role == "opened":  # the median of three; each is shown
                for what, value in row.items():
                    opens.setdefault(what, []).append(value)
            found |= {what: statistics.median(opens[what]) if what in opens else value for what, value in row.items()}
            for what, value in row.items():
                goal = f"   goal: at most {GOALS[what]}" if what in GOALS else ""
                print(f"{what:36s} {value:10.3f}{goal}" if isinstance(value, int | float) else f"{what}: {value}")
            sys.stdout.flush()
        for name, package in (("old", arguments.old), ("new", None)) if arguments.old else ():
            made = process("alone", place, arguments.tokens // 10, package=package)
            row = process("alone", place, 0, package=package, TREE=made["folder"])
            print(f"a tenth of the tokens, {name}:", "  ".join(f"{what} {value:.3f}" for what, value in row.items()))
    finally:
        shutil.rmtree(place)
    missed = [what for what, most in GOALS.items() if not found[what] <= most]
    missed += [] if found["same tokens"] else ["same tokens"]
    missed += [] if found["blocks saved between"] else ["kills while something was saved"]
    print("missed:", ", ".join(missed) if missed else "nothing")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
