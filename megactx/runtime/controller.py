"""Controller: the models and settings of sessions, and the four verbs of the loop (method 13).

    controller = Controller(load_models())
    tree = controller.build_tree(ids)               # [B, T] -> gists of everything
    context = controller.assemble(tree)             # a window of it within the budget
    controller.refocus(context)                     # detail where LensNet wants it
    ids = controller.generate(ids, 100)             # all of it in a loop, past any length

B rows, T tokens, N new tokens.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from megactx.focus import Edits
from megactx.lm.mega_attention import check_sizes
from megactx.memory import MegaContextTree, WorkingContext
from megactx.parts.models import Models

from .drafts import drafter_of
from .events import Observer
from .focusing import Focus
from .plain_lm import LEAST, SINK, Dropping, PlainLM
from .sampling import RECENT, Sampling
from .settings import RESERVE, Settings, note_on
from .stream import Stream


class Controller:
    """Makes streams of history.

    Args:
        models: of ``load_models``. Without a LensNet ``megacontext=focus`` falls back to recency; ``notes`` says so.
            Without a GistNet there are ``none`` and ``recency``, which drops what is old.
        settings: what a person decides.

    Raises:
        ValueError: the budget does not fit models and protected tokens, or there is no GistNet for ``focus``.
    """

    def __init__(self, models: Models, settings: Settings | None = None):
        self.models, self.settings = models, settings or Settings()
        self.notes: list[str] = []
        if self.settings.megacontext == "none":
            return
        if models.gistnet is None:
            self._check_dropping()
            return
        sizes = (models.gistnet.block_size, self.settings.limit or models.base.max_positions)
        asked, self.settings = self.settings, self.settings.fitted(*sizes)
        self.settings.check(*sizes)
        if self.settings != asked:
            self.notes.append(f"{note_on(*sizes)}.")
        if self.settings.positions == "absolute" and models.base.learned_positions():
            raise ValueError(
                f"positions=absolute is not allowed: this base LM has a table of {models.base.max_positions} learned"
                " positions and no further ones; allowed is rebased"
            )
        if self.settings.attention == "mega":
            self._check_mega(sizes[0])
        if self.settings.keys and models.keys is None:
            raise ValueError(
                f"keys={self.settings.keys} is not allowed: there are no keys in {models.name or 'these models'};"
                " megactx.studies.keys trains some, into the folder keys of the models"
            )
        if self.settings.keys:
            models.keys.ready()
        if self.settings.drafts == "foretold" and models.prediction is None:
            raise ValueError(
                f"drafts=foretold is not allowed: there is no readout in {models.name or 'these models'};"
                " experiment=mega_prediction trains one"
            )
        if self.settings.megacontext == "focus" and models.lensnet is None:
            self.notes.append("There is no LensNet here: the newest text has the detail (megacontext=recency).")

    @property
    def plain(self) -> str | None:
        """What to call it where the base LM reads tokens only, without a tree and a window of it; else ``None``."""
        if self.settings.megacontext == "none":
            return PlainLM.kind
        return Dropping.kind if self.models.gistnet is None else None

    def _check_mega(self, block: int) -> None:
        check_sizes(block, self.settings.segment, self.settings.mid, self.settings.live, self.settings.overlap)
        if self.models.base.learned_positions():
            raise ValueError("attention=mega is not allowed: this base LM has a table of positions, and no fractions")

    def _check_dropping(self) -> None:
        if self.settings.attention == "mega":
            raise ValueError("attention=mega is not allowed without a GistNet, whose gists it reads")
        if self.settings.drafts != "none":
            raise ValueError(f"drafts={self.settings.drafts} is not allowed without a GistNet, allowed is none")
        if self.settings.megacontext == "focus":
            raise ValueError(
                f"model: there is no GistNet in {self.models.name or 'these models'}; megacontext=recency drops old"
                " text instead, megacontext=none is the plain base LM"
            )
        if self.settings.positions == "absolute":
            raise ValueError(
                "positions=absolute is not allowed without a GistNet: old text is dropped; allowed is rebased"
            )
        limit, asked = self.settings.limit or self.models.base.max_positions, self.settings.budget
        if not LEAST <= min(asked, limit):
            raise ValueError(
                f"budget={asked} is not allowed: at least {LEAST} tokens, of a base LM that takes so many positions;"
                f" this one takes {limit}"
            )
        self.settings = replace(self.settings, budget=min(asked, limit))
        self.notes.append(
            f"There is no GistNet here: of a longer history the first {SINK} tokens and the newest are kept, at most"
            f" {self.settings.budget:,}; what lies between is dropped, not compressed."
        )

    def build_tree(self, ids: Tensor, lengths: Tensor | None = None) -> MegaContextTree:
        """ids [B, T], lengths [B] -> the tree of all of them; see ``MegaContextTree.append`` for what is refused."""
        ids = ids.to(self.models.base.model.device)
        return MegaContextTree.from_tokens(ids, self._gistnet(), self.models.base, lengths)

    def assemble(self, tree: MegaContextTree) -> WorkingContext:
        """A window of a tree: recency, then refocused until LensNet rests.

        Raises:
            ValueError: not even the coarsest view fits the budget.
        """
        return self._focus().start(tree)

    def refocus(self, context: WorkingContext) -> Edits | None:
        """One refocus, in place; -> its edits, ``None`` without LensNet, or where nothing is to decide.

        A ``Stream`` also remembers what it changed.
        """
        return self._focus().refocus(context)[1]

    def stream(
        self, rows: int = 1, tree: MegaContextTree | None = None, observers: Iterable[Observer] = ()
    ) -> "Stream | PlainLM":
        """Histories of B rows, empty or those of a tree; of the plain base LM with ``megacontext=none``, or without a
        GistNet."""
        if self.plain:
            if tree is not None:
                raise ValueError(f"{self.plain} reads no tree; allowed with one are focus and recency")
            if self.settings.megacontext == "none":
                return PlainLM(self.models.base, rows)
            return Dropping(self.models.base, rows, self.settings.budget, self.settings.budget // RESERVE)
        return Stream(self.models, self.settings, rows, tree, observers)

    def generate(
        self,
        ids: Tensor,
        max_tokens: int,
        lengths: Tensor | None = None,
        sampling: Sampling | None = None,
        stop: Iterable[int] = (),
    ) -> list[Tensor]:
        """Continue a batch of prompts, each as long as it likes.

        Args:
            ids: [B, T], each row with its BOS.
            max_tokens: N at most.
            lengths: tokens of each prompt, [B]; ``None``: T.
            stop: ids that end a row; the last one is part of what comes back.

        Returns:
            The new tokens of each row, B tensors [<= N] on the CPU.

        Raises:
            ValueError: an empty prompt, or ids that the base cannot embed.
        """
        stream = self.stream(len(ids))
        stream.append(ids, lengths)
        ends = frozenset(stop)
        columns = list(decode(stream, max_tokens, sampling or Sampling(), lambda row, token: token in ends))
        return [torch.tensor([c[row] for c in columns if c[row] is not None]) for row in range(len(ids))]

    def _focus(self) -> Focus:
        return Focus(self.settings, self._gistnet().block_size, self.models.lensnet)

    def _gistnet(self):
        if self.plain:
            raise ValueError(f"{self.plain} has no tree and no window; allowed with them are focus and recency")
        return self.models.gistnet


def decode(
    stream: Stream | PlainLM, max_tokens: int, sampling: Sampling, over: Callable[[int, int], bool] | None = None
) -> Iterator[list[int | None]]:
    """Decode token by token; -> the token of each row, ``None`` for rows that have stopped.

    A token is part of the history before it is yielded, so who stops listening loses nothing.

    Args:
        over: (row, token) -> whether the row ends with it; asked before the token is yielded.

    Raises:
        ValueError: ``max_tokens`` is negative, or the base LM breaks down.
    """
    if max_tokens < 0:
        raise ValueError(f"max_tokens={max_tokens} is not allowed: at least 0")
    active = torch.ones(stream.rows, dtype=torch.bool)
    recent = stream.newest(RECENT) if sampling.repetition_penalty != 1 else None
    drafter = drafter_of(stream) if isinstance(stream, Stream) and max_tokens > 1 else None
    for left in range(max_tokens, 0, -1):
        if drafter is not None and not stream.ahead:
            stream.foresee(drafter.draft()[: left - 1])
        logits = stream.logits()
        nothing = torch.zeros(stream.rows, 0, dtype=torch.long, device=logits.device)
        tokens = sampling.choose(logits, nothing if recent is None else recent, stream.lengths)
        stream.push(tokens, None if active.all() else active.to(tokens.device))
        if recent is not None:
            recent = torch.cat([recent, tokens[:, None]], dim=1)[:, -RECENT:]
        if drafter is not None:
            drafter.took(int(tokens[0]))
        found = [token if on else None for token, on in zip(tokens.tolist(), active.tolist(), strict=True)]
        if over is not None:
            active &= torch.tensor([t is not None and not over(row, t) for row, t in enumerate(found)])
        yield found
        if not active.any():
            return
