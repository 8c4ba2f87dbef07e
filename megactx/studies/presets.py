"""What a preset costs and saves: a prompt as closed gists, beside the whole prompt and beside its keys and values.

    python -m megactx.studies.presets                              the embedded models and text
    python -m megactx.studies.presets smollm2 --path TEXTS --prompt 512

    whole      [BOS][ prompt ][ answer ]          read again in every session
    cache      [ keys and values ][ answer ]      nothing of the prompt is read again
    preset     [ gists ][BOS][ answer ]           closed gists, of 32 tokens, or as coarse as the tree has them
    newest     [BOS][ end of the prompt ][ answer ]   as many entries as the preset has
    nothing    [BOS][ answer ]

The answer is the text that follows the prompt. Time is from an open model to the logits behind the answer's first
block, the opening of the preset's folder included.
"""

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache

from megactx.apps import preset
from megactx.evaluation.bootstrap import mean_interval
from megactx.evaluation.table import Report, Table, pivot
from megactx.framework.bar import bar
from megactx.lm.chunked_head import nll
from megactx.parts.models import Models, load_models
from megactx.runtime import Controller, Settings, Wanted

from .study import Options, command, multiple, usable
from .trained import held_out

WHOLE, CACHE, NOTHING = "whole prompt", "its keys and values", "nothing"
FINE, COARSE, NEWEST, OTHER = "preset, gists of blocks", "preset, coarsest gists", "newest tokens", "another preset"
BUDGET, EVERY, AGAIN = 2048, 10**6, 3
LEGEND = (
    "NLL: nats per token of the answer. above: that minus the whole prompt's. entries: what stands for the prompt."
    " ms: from an open model to the logits behind the answer's first block, the best of three. Brackets: 95 %,"
    " bootstrap over texts."
)


def options(given: Options) -> None:
    about = "base and GistNet: an asset, an export; without it the embedded models"
    given.add("model", nargs="?", metavar="MODEL", help=about)
    given.path()
    given.number("prompt", 512, "tokens of the prompt, a multiple of K", least=2)
    given.number("answer", 128, "tokens that follow and are scored, a multiple of K", least=2)
    given.number("documents", 24, "documents", least=2)
    given.add("--out", type=Path, default=Path("presets"), help="folder of the tables")


def study(args: argparse.Namespace) -> Iterator[tuple[Path, Report]]:
    """Score every answer behind each form of its prompt.

    Raises:
        ValueError: a number that is not allowed, no GistNet, or no text that is long enough.
    """
    stem = usable(args.out) / "presets"
    models = load_models(args.model, setting="MODEL")
    if models.gistnet is None:
        raise ValueError(f"MODEL={args.model}: there is no GistNet for it")
    block = models.gistnet.block_size
    for name in ("prompt", "answer"):
        multiple(name, getattr(args, name), block)
    length = 1 + args.prompt + args.answer
    batches = held_out(models.base, args.path, block, 1, length, EVERY)[: args.documents]
    texts = [batch["ids"][0, :length] for batch in batches]
    if len(texts) < 2:
        raise ValueError(f"--path={args.path}: {len(texts)} texts have {length} tokens, at least 2 are needed")
    about = {"model": models.name, "path": args.path, "prompt": args.prompt, "answer": args.answer}
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, ids in enumerate(bar("texts")(texts)):
            other = texts[(number + 1) % len(texts)]
            rows.append(Forms(models, Path(folder) / str(number), ids, other, args.prompt).measured())
            yield stem, report(rows, about)


class Forms:
    """One text in all forms.

    Args:
        folder: for its presets.
        ids: BOS, prompt and answer, [1 + P + A].
        other: the same of another text.
        prompt: P.
    """

    def __init__(self, models: Models, folder: Path, ids: Tensor, other: Tensor, prompt: int):
        self.models, self.folder, self.ids = models, folder, ids.to(models.base.model.device)
        self.bos, self.prompt, self.answer = self.ids[:1], self.ids[1 : 1 + prompt], self.ids[1 + prompt :]
        self.block = models.gistnet.block_size
        budget = min(BUDGET, models.base.max_positions - 2 * self.block)
        self.controller = Controller(models, Settings(budget=budget, megacontext="recency"))
        depth, tokens = 1, prompt
        while (tokens := tokens // self.block) >= self.block:
            depth += 1
        for name, text, level in (("fine", ids, 1), ("coarse", ids, depth), ("other", other, 1)):
            preset.save(folder / name, text[1 : 1 + prompt].tolist(), models, level, {"file": "text"})

    def measured(self) -> dict[str, dict]:
        """Form -> ``nll`` of each token of the answer [A], ``entries``, ``ms``."""
        entries = prompt = len(self.prompt)
        found = {WHOLE: self._form(self.prompt, None) | {"entries": entries}}
        found[CACHE] = self._cached() | {"entries": entries}
        for name, place in ((FINE, "fine"), (COARSE, "coarse"), (OTHER, "other")):
            found[name] = self._form(self.prompt[:0], place)
        count = found[FINE]["entries"]
        found[NEWEST] = self._form(self.prompt[prompt - count :], None) | {"entries": count}
        found[NOTHING] = self._form(self.prompt[:0], None) | {"entries": 0}
        return found

    def _stream(self, before: Tensor, place: str | None):
        stream = self.controller.stream()
        if place is not None:
            stream.use([Wanted("preset", self.folder / place)])
        stream.append(torch.cat([self.bos, before])[None])
        return stream

    def _form(self, before: Tensor, place: str | None) -> dict:
        stream = self._stream(before, place)
        found = stream.append(self.answer[None], score=True)[0]
        entries = 0 if place is None else stream.seen.caps[0]

        def first():
            stream = self._stream(before, place)
            stream.append(self.answer[None, : self.block])
            stream.logits()

        return {"nll": found, "entries": entries, "ms": _best(first)}

    @torch.no_grad()
    def _cached(self) -> dict:
        """The prompt's keys and values are there; they are copied, for the next session wants them too."""
        base, kept = self.models.base, DynamicCache()
        hidden = base.model.base_model(input_ids=torch.cat([self.bos, self.prompt])[None], past_key_values=kept)
        states = base.model.base_model(input_ids=self.answer[None], past_key_values=copy.deepcopy(kept))
        rows = torch.cat([hidden.last_hidden_state[0, -1:], states.last_hidden_state[0, :-1]])

        def first():
            ids = self.answer[None, : self.block]
            base.logits(base.model.base_model(input_ids=ids, past_key_values=copy.deepcopy(kept)).last_hidden_state)

        return {"nll": nll(base, rows, self.answer).cpu(), "ms": _best(first)}


def _best(work: Callable[[], None]) -> float:
    times = []
    for _ in range(AGAIN):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return 1e3 * min(times)


def report(rows: list[dict], about: dict) -> Report:
    """As tables."""
    table, owner = Table(), torch.arange(len(rows))
    whole = torch.stack([row[WHOLE]["nll"].double().mean() for row in rows])
    for name in rows[0]:
        own = torch.stack([row[name]["nll"].double().mean() for row in rows])
        table.add("nll", mean_interval(owner, own), carrier=name, n=len(rows))
        table.add("above", mean_interval(owner, own - whole), carrier=name, n=len(rows))
        table.add("entries", sum(row[name]["entries"] for row in rows) / len(rows), carrier=name)
        table.add("ms", mean_interval(owner, torch.tensor([row[name]["ms"] for row in rows])), carrier=name)
    columns = [("NLL", "nll", ".3f"), ("above", "above", "+.3f"), ("entries", "entries", ".0f"), ("ms", "ms", ".1f")]
    title = f"{len(rows)} texts, {about['answer']} tokens behind a prompt of {about['prompt']:,}"
    sheet = pivot(title, table, columns, heading="in place of the prompt", strong=[FINE])
    return Report("Presets", table, [sheet], LEGEND, about=about)


main = command("presets", __doc__, options, study)

if __name__ == "__main__":
    sys.exit(main())
