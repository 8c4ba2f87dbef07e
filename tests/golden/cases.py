"""What is measured for the golden files: every stage and every compressor for 20 steps, reports, a session.

Everything is made here, from seeds: the texts, the tokenizer, the base, the nets. So the numbers move only where the
method, or the order in which random numbers are drawn, moves.
"""

import csv
import json
import random
import subprocess
from functools import cache
from pathlib import Path

import torch

STEPS, K = 20, 8
PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed"}
WORDS = (
    "river stone window letter garden engine winter captain silver market shadow bridge colour doctor answer forest"
    " number village corner mirror paper signal station summer teacher thunder valley weather yellow island"
).split()
TIMES = ("speed/", "memory/")  # how long it took is not what it found


def machine() -> str:
    """What arithmetic depends on: the processor's name and units, and torch."""
    lines = subprocess.run(["lscpu"], capture_output=True, text=True, check=False).stdout.splitlines()
    found = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return f"{found.get('Model name')}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def texts(folder: Path) -> Path:
    """40 prose-like and 40 code-like files of random words, in which passages come back."""
    folder.mkdir()
    draw = random.Random(7)
    for index in range(40):
        names = draw.sample(WORDS, 9)
        passage = " ".join(draw.choices(names, k=30))
        prose = [" ".join(draw.choices(names, k=12)).capitalize() + "." for _ in range(45)]
        prose[10] = prose[30] = passage
        (folder / f"{index:02}.md").write_text("\n".join(prose))
        code = [f"def {a}_{b}({a}, {b}):\n    return {a} + {b} * {draw.randint(0, 99)}" for a, b in _pairs(draw, names)]
        (folder / f"{index:02}.py").write_text("\n\n".join([*code, *code[:8]]))
    return folder


def _pairs(draw: random.Random, names: list[str]):
    return [draw.sample(names, 2) for _ in range(40)]


@cache
def world(folder: Path) -> dict[str, Path]:
    """Texts, a base LM with a tokenizer of 512 ids, a GistNet; -> where they lie."""
    from megactx.data.tokenizer import train_tokenizer
    from megactx.gist import GistNet
    from megactx.lm import BaseLM
    from megactx.parts.write import save_gistnet

    found = {"texts": texts(folder / "texts"), "base": folder / "base", "gistnet": folder / "gistnet"}
    written = [path.read_text() for path in sorted(found["texts"].iterdir())]
    tokenizer = train_tokenizer(written, vocab_size=512, progress=False)
    config = dict(model_type="llama", vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    config |= dict(
        num_attention_heads=2, max_position_embeddings=512, pad_token_id=1, bos_token_id=0, eos_token_id=None
    )
    torch.manual_seed(0)
    base = BaseLM.from_config(config)
    for p in base.parameters():  # a random base is indifferent to what it reads: sharpen it
        p.data *= 3
    base.model.save_pretrained(found["base"])
    tokenizer.save_pretrained(found["base"])
    base = BaseLM.from_pretrained(str(found["base"])).freeze()
    torch.manual_seed(3)
    given = {"block_size": K, "num_heads": 4}
    save_gistnet(GistNet(32, base.embedding_rms(), **given), given, base, found["gistnet"])
    return found


def common(folder: Path, places: dict) -> list[str]:
    """What all trainings share."""
    own = [f"folder={folder}", "trainer=cpu", "trainer.log_every_n_steps=1", f"block_size={K}", "data=files"]
    return [*own, f"data.path={places['texts']}", "data.weights={narrative: 0.5, code: 0.5, structured: 0}"]


def trained(folder: Path, places: dict, overrides: list[str]) -> dict:
    """Train; -> ``curve``: every logged value of every step, and the report's numbers."""
    from megactx.framework.app import run

    assert run([*common(folder, places), *overrides]) == 0
    with (folder / "metrics.csv").open() as file:
        rows = [{k: float(v) for k, v in row.items() if v and not k.startswith(TIMES)} for row in csv.DictReader(file)]
    assert len({row["step"] for row in rows}) >= STEPS
    found = {"curve": rows}
    for name in ("report.json", "ladder.json"):
        if (folder / name).exists():
            text = (folder / name).read_text()
            found[name] = json.loads(text.replace(str(places["base"]), "BASE"))
            found[name].pop("shown", None)  # the same numbers, in words
    return found


def gist_settings(places: dict) -> list[str]:
    return [
        *[f"base.name={places['base']}", "gistnet.num_heads=4", f"preset.steps={STEPS}", "preset.warmup=2"],
        *["preset.batch=2", "preset.spans=3", f"preset.validate_every={STEPS // 2}", "preset.validation_documents=2"],
        *["preset.min_tokens=200", "preset.max_tokens=300", "stage.evaluate.blocks=24", "stage.evaluate.copies=4"],
    ]


HISTORY = ["loss.history.segment=16", "loss.history.recency=32"]


def gist(places: dict) -> list[str]:
    """All losses at once, gists of gists, and the demo's report with everything in it."""
    own = ["experiment=demo", *gist_settings(places), *HISTORY, "contrastive=c05", "gistnet.levels=2"]
    own += ["loss.block.weight=0.7", "loss.history.weight=0.3", "loss.recall.weight=0.1", "loss.level2.weight=0.2"]
    own += ["datamodule.level2_spans=1", "stage.evaluate.level2=4", "stage.evaluate.reconstruction=3"]
    return [*own, "stage.evaluate.history=4", "gistnet.dropout=0.1"]


def poolings(places: dict) -> list[str]:
    """Every pooling and head of GistNet, beside each other."""
    nets = ("{pooling: query}", "{pooling: cls, head: linear}", "{pooling: mean, head: mlp, layers: 1}")
    given = ", ".join(f"net{i}: {net[:-1]}, num_heads: 4, block_size: {K}}}" for i, net in enumerate(nets))
    return ["experiment=demo", *gist_settings(places), f"+stage.controls={{{given}}}", "loss.block.objective=delta_nll"]


def ladder(places: dict) -> list[str]:
    """Every compressor, and the ladder itself."""
    nets = ("gistnet_original", "gistnet_hidden", "gistnet_context")
    heads = [f"+stage.controls.{name}.num_heads=4" for name in nets]
    own = [s for s in gist_settings(places) if not s.startswith("stage.evaluate.copies")]
    own += ["stage.evaluate.copies=0", "stage.evaluate.controls=false", "stage.evaluate.history=6", *HISTORY]
    own += ["stage.ladder.oracle=3", "stage.ladder.history_oracle=2", "stage.ladder.oracle_steps=2"]
    return ["experiment=ladder", *own, *heads]


def windows(places: dict) -> list[str]:
    """What the stages share that read working contexts."""
    return [
        *["preset=demo", f"base.name={places['base']}", f"stage.gistnet={places['gistnet']}"],
        *["horizon.tokens=8", "lensnet.num_heads=4", "lensnet.dropout=0.1", "preset.warmup=1"],
        *["datamodule.min_tokens=300", "datamodule.max_tokens=400", "datamodule.batch=2"],
        *["datamodule.validation_windows=3", "stage.budgets=[0.6, 0.7]", "stage.evaluate.documents=3"],
        *["stage.evaluate.tokens=300", "stage.evaluate.budgets=[0.6]"],
    ]


def lens(places: dict) -> list[str]:
    own = ["experiment=lens", f"preset.steps={STEPS}", f"preset.validate_every={STEPS // 2}"]
    own += ["stage.windows.per_round=4", "stage.windows.rounds=2", "stage.windows.edits=6"]
    return [*windows(places), *own, "stage.evaluate.oracle=1", "stage.evaluate.planted=4"]


def alternating(places: dict) -> list[str]:
    """7 steps of each part in turn."""
    own = ["experiment=alternating", "stage.lens=null", "stage.lora.rank=4", "stage.cycles=1", "datamodule.spans=3"]
    own += [f"stage.steps.{name}=7" for name in ("gist", "lens", "lora")]
    own += ["stage.windows.per_round=4", "stage.windows.edits=6", "preset.validate_every=7", "datamodule.documents=2"]
    return [*windows(places), *own]


def end_to_end(places: dict) -> list[str]:
    own = ["experiment=end_to_end", "stage.lens=null", "stage.train_base=lora", "stage.lora.rank=4"]
    own += [f"preset.steps={STEPS}", f"preset.validate_every={STEPS // 2}", "datamodule.documents=1"]
    return [*windows(places), *own, "stage.windows.sources=2", "stage.windows.variants=6", "stage.windows.per_pass=4"]


def base_lm(places: dict) -> list[str]:
    size = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512}
    own = ["experiment=base_lm", "preset=demo", f"base.name={places['base']}", f"preset.steps={STEPS}"]
    own += ["preset.warmup=2", f"preset.validate_every={STEPS // 2}", "stage.evaluate.documents=3"]
    own += [f"stage.config.{name}={value}" for name, value in size.items()]
    own += ["datamodule.weights={narrative: 0.5, code: 0.5, structured: 0}"]
    return [*own, "datamodule.phases=[{steps: 12, tokens: 128, batch: 2}, {steps: 8, tokens: 256, batch: 1}]"]


RUNS = {run.__name__: run for run in (gist, poolings, ladder, lens, alternating, end_to_end, base_lm)}


def session(places: dict) -> dict:
    """64 tokens behind a text, LensNet deciding every block: the tokens, and the window behind each block."""
    from megactx.focus import LensNet
    from megactx.gist import GistNet
    from megactx.lm import BaseLM
    from megactx.runtime import Controller, Models, Sampling, Session, Settings

    base = BaseLM.from_pretrained(str(places["base"]), "float32").freeze()
    torch.manual_seed(0)
    gistnet = GistNet(base.width, base.embedding_rms(), block_size=4, num_heads=4, skip="none").eval()
    lensnet = LensNet(base.width, 4, layers=1, num_heads=4).eval()
    torch.nn.init.normal_(lensnet.last.weight, std=0.05)
    torch.nn.init.constant_(lensnet.last.bias, 0.2)  # detail is worth something nearly everywhere
    models = Models(base, gistnet.requires_grad_(False), lensnet.requires_grad_(False), "golden")
    settings = Settings(budget=96, allocator={"protected": 8}, megacontext="focus")
    seen = Session(Controller(models, settings))
    seen.append((places["texts"] / "00.md").read_text()[:1600])
    tokens, shown = [], []
    for piece in seen.generate(64, Sampling(temperature=1.0, top_k=40, seed=5)):
        tokens.append(piece.token)
        if len(tokens) % 4 == 0:
            context = seen.context
            shown.append(" ".join(f"{a}.{b}" for a, b in zip(*_entries(context), strict=True)))
    seen.close()
    return {"tokens": tokens, "windows": shown}


def _entries(context) -> tuple[list[int], list[int]]:
    here = slice(0, int(context.counts[0]))
    return context.lod[0, here].tolist(), context.index[0, here].tolist()
