"""What a person decides about a session: how large its window is, what fills it, where positions end."""

import inspect
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from megactx.focus.allocator import FocusAllocator
from megactx.focus.edits import PROTECTED
from megactx.focus.keys import QUESTION
from megactx.framework.config.types import Count, Whole, declared
from megactx.memory.pyramid import Attention

KINDS, POSITIONS = ("focus", "recency", "none"), ("rebased", "absolute")
READING, REUSE, DRAFTS = ("plain", "mega"), ("exact", "approximate"), ("none", "lookup", "nearest", "foretold")
HISTORY = 2**20  # tokens of history whose coarsest view must fit any window
# Settings that change no window.
HOW = ("recall", "graphs", "drafts", "reuse", "attention", "segment", "mid", "live", "overlap")
RESERVE = 8  # one part in so many of a window is room for new tokens


@declared()
@dataclass(frozen=True)
class Settings:
    """How histories are read.

    Args:
        budget: entries of a working context, W_max.
        megacontext: ``focus`` (LensNet decides where detail is), ``recency`` (the newest text has it) or ``none`` (the
            plain base LM, no working context at all).
        positions: ``rebased`` keeps them below ``limit`` however long the history is, without gaps between entries that
            ``earn`` has chosen; ``absolute`` lets them grow.
        limit: positions that the base was trained on; ``None``: what its config says.
        allocator: keyword arguments of ``FocusAllocator``.
        earn: read the sink and the newest tokens, and of what is older only what stands where the end of the text stood
            before, and what LensNet's own estimate puts above them, see ``repeats`` and ``focus.earned``; else all of
            the window, gists included.
        keys: blocks, at most, that what a user asks finds among all blocks of the history by their keys, and that are
            read besides, however coarse the window is there; with ``earn`` alone. 0: none.
        newest: tokens up to the end of what a user asked, at most, that are read beside the blocks which that finds; 0,
            the question alone, or 64 at least, as a question has. Of a longer turn the rest is found by keys, like all
            that is older. ``None``: as many as have room. A small base LM answers better from few.
        recall: what stood behind the end of the text wherever it stood before is mixed into what the base says of the
            next token, see ``recall``; with ``earn`` alone. It takes no room of the window.
        edit_every: blocks of new tokens between two refocuses by LensNet. Above 1 the edits of so many blocks are made
            at once, so that what stands behind them is read again once.
        graphs: read single new tokens at fixed shapes, on a card as one CUDA graph: a token is one launch. Off by
            default: it has not met a card yet.
        drafts: what may come next is read along with the newest token, and what of it comes is not read again. Of one
            text, to the same tokens. ``lookup``, ``nearest``, ``foretold``: where it comes from, see ``drafts``.
        reuse: ``exact``: behind an edit all is read again; ``approximate``: only what is new is read, and the rest
            keeps the keys and values that it had, see ``ApproximatePrefill``: sessions then say a little else.
        attention: ``plain``: every entry sees all before it; ``mega``: see ``MegaMask``, most keys and values outlast
            an edit.
        segment, mid, live, overlap: of ``mega``, tokens, see ``MegaMask``.

    Raises:
        ValueError: a setting that is not known.
    """

    budget: Count = 2048
    megacontext: Literal[KINDS] = "focus"
    positions: Literal[POSITIONS] = "rebased"
    limit: Count | None = None
    allocator: dict = field(default_factory=dict)
    earn: bool = False
    keys: Whole = 0
    newest: Whole | None = None
    recall: bool = False
    edit_every: Count = 1
    graphs: bool = False
    drafts: Literal[DRAFTS] = "none"
    reuse: Literal[REUSE] = "exact"
    attention: Literal[READING] = "plain"
    segment: Count = 128
    mid: Count = 1024
    live: Whole = 128
    overlap: Whole = 0

    def __post_init__(self):
        if self.recall and not self.earn:
            raise ValueError("recall=true is not allowed without earn=true, which looks for what comes again")
        if self.keys and not self.earn:
            raise ValueError(f"keys={self.keys} is not allowed without earn=true, which reads what stands out")
        if self.newest is not None and not self.keys:
            raise ValueError(f"newest={self.newest} is not allowed without keys, which find what it stands beside")
        if self.newest and self.newest < QUESTION:
            told = f"0, the question alone, or at least {QUESTION}, as many as a question has"
            raise ValueError(f"newest={self.newest} is not allowed: {told}")
        if self.drafts != "none":
            if self.graphs:
                raise ValueError(f"graphs=true is not allowed with drafts={self.drafts}: it reads token by token")
            if self.megacontext == "none":
                raise ValueError(f"drafts={self.drafts} is not allowed with megacontext=none, allowed is none")
        if self.reuse == "approximate":
            for name, value in (("graphs", True), ("attention", "mega")):
                if getattr(self, name) == value:
                    raise ValueError(f"{name}={str(value).lower()} is not allowed with reuse=approximate")
        if self.attention == "mega":
            for name in ("earn", "graphs"):
                if getattr(self, name):
                    raise ValueError(f"{name}=true is not allowed with attention=mega")
            if self.megacontext == "none":
                raise ValueError("attention=mega is not allowed with megacontext=none, which has no gists to read")
        allowed = inspect.signature(FocusAllocator).parameters
        if unknown := [name for name in self.allocator if name not in allowed]:
            raise ValueError(f"allocator.{unknown[0]} is not known, allowed are {', '.join(allowed)}")
        FocusAllocator(**self.allocator)  # says now what it would refuse at the first refocus

    @property
    def mega(self) -> Attention:
        """How a window is read with ``attention=mega``."""
        return Attention("mega", self.segment, self.mid, self.live, overlap=self.overlap)

    @property
    def protected(self) -> int:
        """Newest tokens that stay in detail."""
        return self.allocator.get("protected", PROTECTED)

    def fitted(self, block_size: int, limit: int) -> "Settings":
        """The same with a smaller protected tail, where nobody has set it and the base has few positions."""
        if self.megacontext == "none" or self.positions != "rebased" or "protected" in self.allocator:
            return self
        protected = tail(block_size, limit)
        return self if protected == PROTECTED else replace(self, allocator=self.allocator | {"protected": protected})

    def reserve(self, block_size: int) -> int:
        """Entries of the window that are kept free for new tokens: so many come before room has to be made again."""
        return max(1, self.budget // RESERVE // block_size) * block_size

    def check(self, block_size: int, limit: int) -> None:
        """Refuse a budget into which a long history does not fit, or that does not fit the base.

        Args:
            block_size: K.
            limit: positions that the base takes.

        Raises:
            ValueError: names the budget and what is allowed.
        """
        if self.megacontext == "none":
            return
        least = least_budget(block_size, self.protected)
        if self.positions == "rebased" and least + 2 * block_size > limit:
            raise ValueError(_too_few(block_size, limit, self.protected))
        if self.budget < least:
            raise ValueError(
                f"budget={self.budget} is not allowed: at least {least} entries, so that {HISTORY:,} tokens fit at"
                f" their coarsest beside the sink and {self.protected} protected tokens"
            )
        if self.positions == "rebased" and self.budget + 2 * block_size > limit:
            raise ValueError(
                f"budget={self.budget} is not allowed: at most {limit - 2 * block_size}, for the base LM takes {limit}"
                f" positions and {2 * block_size} are needed for new tokens; or positions=absolute, which leaves"
                " the range that the base was trained on in a long history"
            )

    def least(self, block_size: int) -> int:
        """Entries of the budget that a history needs beside parts."""
        return core(block_size, self.protected) + self.reserve(block_size)

    def check_parts(self, block_size: int, spent: int) -> None:
        """Refuse parts beside which a long history does not fit, or whose positions would move when they do.

        Args:
            block_size: K.
            spent: entries of all parts at most.

        Raises:
            ValueError: names the setting and what is allowed.
        """
        if self.positions == "absolute":
            raise ValueError(
                "positions=absolute is not allowed with parts: what stands behind a part moves when it changes; allowed"
                " is rebased"
            )
        if self.budget - spent < (least := self.least(block_size)):
            raise ValueError(
                f"budget={self.budget} is not allowed: the parts take {spent} entries of it, and the session needs"
                f" {least}; lower their shares, or raise the budget"
            )

    def as_dict(self) -> dict:
        """For a file."""
        return asdict(self)

    def of_window(self) -> dict:
        """Those that decide what a window shows; the others decide how it is read."""
        return {name: value for name, value in asdict(self).items() if name not in HOW}


def tail(block_size: int, limit: int) -> int:
    """Newest tokens that stay in detail: ``PROTECTED``, or fewer, in whole blocks, where positions are few."""
    for protected in (PROTECTED, *range(PROTECTED // block_size * block_size, block_size, -block_size)):
        if least_budget(block_size, protected) + 2 * block_size <= limit:
            return protected
    return min(block_size, PROTECTED)


def note_on(block_size: int, limit: int) -> str:
    """What a person should know of sessions with a base that takes few positions; empty where there is nothing."""
    protected = tail(block_size, limit)
    if least_budget(block_size, protected) + 2 * block_size > limit:
        return _too_few(block_size, limit, protected)
    if protected < PROTECTED:
        return f"the base LM takes {limit} positions: the newest {protected} tokens stay in detail, not {PROTECTED}"
    return ""


def _too_few(block_size: int, limit: int, protected: int) -> str:
    return (
        f"the base LM takes {limit} positions, sessions with blocks of {block_size} and {protected} protected tokens"
        f" need at least {least_budget(block_size, protected) + 2 * block_size}; megacontext=none takes any"
    )


def least_budget(block_size: int, protected: int = PROTECTED) -> int:
    """Entries that a window must have: ``core``, and its reserve."""
    return -(-core(block_size, protected) * RESERVE // (RESERVE - 1))


def core(block_size: int, protected: int = PROTECTED) -> int:
    """Entries that a history takes: the sink, at both ends up to K - 1 nodes of each level, and the newest text."""
    k, levels = block_size, 0
    while k**levels < HISTORY:
        levels += 1
    return 2 * k + 2 * (k - 1) * levels + protected
