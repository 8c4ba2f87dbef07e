"""Keeping a saved tree clean: what may be taken away from it, how that is done, and how it comes back.

Every block has a *floor*: the finest level that is kept of it, 0 for its tokens, n for its gist of level n. To
*compact* a span is to raise its floor: its tokens, and its gists below the floor, go into the archive, and a window can
no longer open it. A span that was compacted is restored before it gets another floor, see ``archive``.

Protected blocks, the first block and the newest tokens are never touched. No model is needed.

N blocks, K tokens of a block.
"""

import hashlib
import importlib
import inspect
import json
import pkgutil
from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import archive, policies, storage
from .archive import FORMAT, Archive
from .description import key_size, tokens
from .page_cache import PageCache
from .page_file import PageFile
from .pages import SIGNAL_COLUMNS, SIGNALS, Pages
from .tree import columns_of

DEFAULT = ("unread", "duplicate")
DEEPEST = 32  # floor of an action of a plan: no tree has so many levels


class Curated(Archive):
    """A saved tree of one row without its models.

    Attributes of its blocks, [N] each: ``opened``, ``access``, ``time``, ``floor``, ``protected``, and ``may``: whether
    it may be touched at all. In nats per token, NaN where nobody knows: ``worth``, what LensNet says on the mean that
    its tokens are worth above its gist; ``dnll``, what collapsing it was measured to cost; ``nll``, how much its own
    tokens surprise the base LM. ``freed`` is what compacting one block to its floor frees, in bytes.

    Args:
        folder: of the tree.
        level: the floor that compacting gives.

    Raises:
        ValueError: there is no tree, one of an earlier format, a damaged one, or one of several rows.
    """

    def __init__(self, folder: Path, level: int = 1):
        manifest = storage.read_manifest(folder)
        if manifest["format"] != storage.FORMAT:
            raise ValueError(f"{folder}: it has the format of an earlier version; open and save it once")
        self.level, file = level, PageFile(storage.database(folder, manifest["data"]))
        try:
            about = file.about("tree")
            lengths = tokens(about["lengths"])
            if len(lengths) != 1:
                raise ValueError(f"its {len(lengths)} rows are not curated, only one is")
            super().__init__(folder, file, [], about["block_size"], int(lengths[0]), about)
            dtype = getattr(torch, about["dtype"] or "float32")
            for lod, size in enumerate(about["page_sizes"]):
                signals = bool(about.get("signals"))
                pages = Pages(columns_of(lod, about["width"], dtype, key_size(about), signals), 1, size, "cpu")
                pages.lod, pages.lengths = lod, lengths // self.size**lod
                pages.room = int(pages.lengths[0])
                pages.pages = [{} for _ in range(-(-pages.room // size))]
                self.levels.append(pages)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{folder}: {error}") from error
        self.cache = PageCache(self.file, self.levels)
        for pages in self.levels:
            pages.source = self.cache
        if not 1 <= level < max(2, len(self.levels)):
            raise ValueError(f"floor={level} is not allowed: 1 to {len(self.levels) - 1}")
        if len(self.levels) > 1:
            self._read_facts()

    def _read_facts(self) -> None:
        blocks = self.levels[1]
        for name in ("opened", "access", "time", "floor", "protected"):
            setattr(self, name, blocks.whole(name)[0])
        number, none = torch.arange(len(self.opened)), torch.full((len(self.opened),), torch.nan)
        self.worth, self.dnll, self.nll = none, none.clone(), none.clone()
        if SIGNALS in blocks.parts():
            self.worth = blocks.whole("worth")[0] / blocks.whole("scored")[0]  # 0 / 0 is NaN
            measured = blocks.whole("measured")[0]
            self.dnll, self.nll = (torch.where(measured, blocks.whole(name)[0], none) for name in ("dnll", "nll"))
        self.may = (number > 0) & ~self.protected & (self.floor == 0)
        self.may &= (number + 1) * self.size <= self.tokens - archive.RECENT
        gist = prod(blocks.columns["gist"][0]) * blocks.columns["gist"][1].itemsize + 12
        self.freed = 4 * self.size + sum(int(gist / self.size ** (lod - 1)) for lod in range(1, self.level))
        self.bytes = sum(self.file.sizes()[what] for what in ("tokens", "gists"))

    def kept(self) -> Iterator[tuple[Tensor, np.ndarray]]:
        """Blocks that have their tokens, the oldest first, a page at a time: numbers [n], and tokens [n, K]."""
        level, end = self.levels[0], self.tokens // self.size * self.size
        for first in range(0, end, level.size):
            page = level.span("token", first, min(first + level.size, end))[0].view(-1, self.size)
            numbers = torch.arange(len(page)) + first // self.size
            there = self.floor[numbers] == 0
            yield numbers[there], page[there].cpu().numpy()

    def contents(self) -> Iterator[tuple[int, bytes]]:
        """Of each block that has its tokens its number, and a hash of them; the oldest first."""
        for numbers, page in self.kept():
            for number, block in zip(numbers.tolist(), page, strict=True):
                yield number, hashlib.blake2b(block.tobytes(), digest_size=16).digest()

    def chosen(self, named: dict[str, dict]) -> dict[str, Tensor]:
        """Of each policy the blocks that it would take away and that may be, bool [N].

        Raises:
            ValueError: no such policy, or a setting that it does not have.
        """
        stay = _policy("keep", self, named.get("keep", {}))
        whole = self.size ** (self.level - 1)  # blocks of a span that has the floor
        out = {}
        for name, settings in named.items():
            if name != "keep" and len(self.levels) > 1:
                mine = _policy(name, self, settings) & self.may & ~stay
                spans = mine[: len(mine) // whole * whole].view(-1, whole).all(1)
                out[name] = torch.zeros_like(mine)
                out[name][: len(spans) * whole] = spans.repeat_interleave(whole)
        return out

    def plan(self, named: dict[str, dict]) -> dict:
        """What would be done: plain JSON. Nothing is changed."""
        actions, taken = [], torch.zeros_like(self.may)
        for name, mine in self.chosen(named).items():
            edges = torch.nn.functional.pad((mine & ~taken).int(), (1, 1)).diff()
            first, end = (edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist()
            for start, stop in zip(first, end, strict=True):
                span = {"start": start * self.size, "stop": stop * self.size, "action": "compact", "floor": self.level}
                actions.append(span | {"reason": name, "bytes": (stop - start) * self.freed})
            taken |= mine
        actions.sort(key=lambda action: action["start"])
        return {"format": FORMAT, "tokens": self.tokens, "actions": actions}

    def note_measured(self, numbers: Tensor, dnll: Tensor, nll: Tensor) -> None:
        """Keep what collapsing blocks, numbers [M], was measured to cost, and their own NLL, [M] each; whole or not."""
        blocks = self.levels[1]
        blocks.columns = blocks.columns | SIGNAL_COLUMNS
        with self._step():
            zero = torch.zeros_like(numbers)
            blocks.write(zero, numbers, dnll=dnll, nll=nll, measured=torch.ones_like(numbers, dtype=torch.bool))
            self.about["signals"] = True
            self._write_changes()
        self.dnll[numbers], self.nll[numbers] = dnll.float(), nll.float()


def names() -> list[str]:
    """Of all policies."""
    return sorted(module.name for module in pkgutil.iter_modules(policies.__path__))


def read_plan(path: Path) -> dict:
    """A plan from a file.

    Raises:
        ValueError: it is none.
    """
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(plan["actions"], list) or not isinstance(plan.get("tokens", 0), int):
            raise ValueError("its actions are no list, or its tokens no number")
        for action in plan["actions"]:
            numbers = [action[name] for name in ("start", "stop", "floor")]
            if not all(type(number) is int for number in numbers) or not 1 <= action["floor"] <= DEEPEST:
                raise ValueError(f"an action has no start, stop or floor: {action}")
            if not all(isinstance(action[name], str) for name in ("action", "reason")):
                raise ValueError(f"an action has no reason: {action}")
        return plan
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: it is no plan ({error})") from error


def _policy(name: str, blocks: Curated, settings: dict) -> Tensor:
    if name not in names():
        raise ValueError(f"policy={name} is not known, there are {', '.join(names())}")
    choose = importlib.import_module(f"{policies.__name__}.{name}").choose
    _, *known = inspect.signature(choose).parameters.values()
    kinds = {one.name: one.annotation for one in known}
    for key, value in settings.items():
        if key not in kinds:
            raise ValueError(f"policy={name}: {key} is not known, there are {', '.join(kinds) or 'no settings'}")
        if not isinstance(value, kinds[key]) and not (type(value) is int and isinstance(1.0, kinds[key])):
            what = getattr(kinds[key], "__name__", str(kinds[key]))
            raise ValueError(f"policy={name}: {key}={value} is not allowed, it is {what}")
    if missing := [one.name for one in known if one.default is one.empty and one.name not in settings]:
        raise ValueError(f"policy={name}: {missing[0]} has no value")
    return choose(blocks, **settings)
