"""What becomes of stored gists when the base LM changes: recovery of stored against fresh ones, on the same blocks.

Stored carriers were made with the base LM as it was, and are read by the base LM as it is now. Vectors stand outside of
it: what is stale is only their direction in its embedding space. Keys and values are made inside of it, at every layer.

A change is written as ``0.01`` (to every matrix Gaussian noise of 1 % of its norm), ``steps=20`` (so many training
steps on the embedded text), or a folder (another base LM of the same architecture, such as a finetuned one).
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megactx.data.documents import TRAIN, cut, tokenised
from megactx.data.embedded import Embedded
from megactx.evaluation.bootstrap import difference_intervals, recovery_intervals
from megactx.evaluation.measure import measure
from megactx.evaluation.table import Table
from megactx.gist.carrier import Compressor, KVSlots, SoftTokens
from megactx.lm import BaseLM
from megactx.lm.gaussian_rope import spread
from megactx.lm.kv_hooks import keys_values, recorded
from megactx.lm.prefill import Prefill, prefill

FIRST = 1  # offset from which on keys and values have a score
STEPS = "steps="
LR, WINDOW, BATCH = 1e-4, 512, 4  # of the training steps: AdamW, tokens, windows


class Stored(Compressor):
    """Carriers as a base LM that has changed since once made them.

    Args:
        net: what made them, and still belongs to that base LM.
        was: how that base LM has read the documents.
        as_keys: keep the keys and values that it made of a vector, and not the vector.
    """

    def __init__(self, net: Compressor, was: "Reader", as_keys: bool = False):
        super().__init__(net.block_size, net.position)
        self.net, self.was, self.as_keys, self.makes_vectors = net, was, as_keys, net.makes_vectors and not as_keys
        self.slots = net.slots

    def compress(self, base: BaseLM, prefill: Prefill, starts: Tensor) -> SoftTokens | KVSlots:
        before = self.was.read(prefill.ids)
        carriers = self.net.compress(self.was.base, before, starts)
        return keys_of(self.was.base, before, starts, carriers) if self.as_keys else carriers


class Reader:
    """A base LM as it was; what it has read last is kept, for several carriers ask for the same documents."""

    def __init__(self, base: BaseLM):
        self.base, self.last = base, None

    def read(self, ids: Tensor) -> Prefill:
        if self.last is None or self.last.ids is not ids:
            self.last = prefill(self.base, ids, with_states=True)
        return self.last


def keys_of(base: BaseLM, prefill: Prefill, starts: Tensor, carriers: SoftTokens) -> KVSlots:
    """The keys and values that a base LM makes of vectors [B, N, D], each in place of its block at starts [B, N]."""
    decoder, positions = base.model.get_decoder(), starts + carriers.offset
    sigma = None if carriers.sigma is None else carriers.sigma.expand(positions.shape)
    rows = carriers.vectors[:, :, None].to(prefill.hidden.dtype)
    with recorded(decoder) as states:
        wide = None if sigma is None else sigma[..., None]
        base.forward_branches(rows, positions[..., None], prefill.cache, starts, sigma=wide)
    with spread(decoder, sigma):
        return KVSlots(keys_values(decoder, states[:-1], positions))


def measure_drift(
    base: BaseLM,
    nets: Mapping[str, Compressor],
    changes: Iterable[str],
    batches: Iterable[dict],
    horizon: int,
    seed: int = 0,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Table:
    """Recovery, over h >= 1, of fresh and of stored carriers after each change of the base LM.

    Args:
        nets: name -> compressor of this base LM, all of one block size.
        changes: see the module; the first row is that of no change, where stored and fresh agree.
        batches, horizon: as for ``measure``.
        seed: of the noise, and of the order of the training text.

    Returns:
        Of every change (a run), carrier and form of what is stored: ``nll`` of the base LM with its full context in
        nats per token, and the intervals ``fresh``, ``kept`` (recovery of each) and ``lost`` (fresh minus stored). A
        carrier is named with its form: ``gistnet, vectors`` or ``gistnet, keys and values``.

    Raises:
        ValueError: a change that cannot be read or applied; it is raised before anything is measured.
    """
    changes, batches, table = list(changes), list(batches), Table()
    for change in changes:
        parsed(change)
    was, old = copy.deepcopy((base, dict(nets)), {id(base.tokenizer): base.tokenizer})
    was = Reader(was)
    for change in [None, *changes]:
        carriers, forms = dict(nets), []
        for name, net in old.items():
            for as_keys in (False, True) if net.makes_one_vector else (False,):
                form = "vectors" if net.makes_vectors and not as_keys else "keys and values"
                carriers[f"{name}, {form}"] = Stored(net, was, as_keys)
                forms.append((name, form))
        with changed(base, change, seed):
            scores = measure(base, carriers, batches, horizon, with_controls=False, progress=progress)
        recovery = recovery_intervals(scores, list(carriers), FIRST)
        for name, form in forms:
            stored = f"{name}, {form}"
            lost = difference_intervals(scores, name, [stored], FIRST)[stored]
            found = {"nll": scores.full.mean().item(), "fresh": recovery[name], "kept": recovery[stored], "lost": lost}
            table.add_all(found, "metric", run=change or "none", carrier=stored)
    return table


@contextmanager
def changed(base: BaseLM, change: str | None, seed: int = 0) -> Iterator[None]:
    """The same base LM with other weights inside, and with its own afterwards.

    Raises:
        ValueError: see ``parsed``; or the other base LM has another architecture.
    """
    before = {name: value.clone() for name, value in base.state_dict().items()}
    try:
        if change is not None:
            parsed(change)(base, seed)
        yield
    finally:
        base.load_state_dict(before)


def parsed(change: str) -> Callable[[BaseLM, int], None]:
    """What a change does to a base LM, drawn by a seed.

    Raises:
        ValueError: it is none of the three forms.
    """
    if change.startswith(STEPS):
        steps = change.removeprefix(STEPS)
        if not (steps.isdecimal() and int(steps) > 0):
            raise ValueError(f"--drift={change} is not allowed: {STEPS} takes a whole number from 1")
        return lambda base, seed: _train(base, _windows(base, int(steps), seed))
    try:
        size = float(change)
    except ValueError:
        if not Path(change).expanduser().is_dir():
            allowed = f"a relative size, {STEPS}N, or the folder of another base"
            raise ValueError(f"--drift={change} is not allowed: {allowed}") from None
        return lambda base, seed: _replace(base, change)
    if not 0 < size < math.inf:
        raise ValueError(f"--drift={change} is not allowed: a size is above 0")
    return lambda base, seed: _disturb(base, size, seed)


@torch.no_grad()
def _disturb(base: BaseLM, size: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in base.parameters():
        if p.ndim > 1:
            noise = torch.randn(p.shape, generator=generator).to(p)
            p.add_(noise * (size * p.norm() / noise.norm()))


def _replace(base: BaseLM, name: str) -> None:
    other = BaseLM.from_pretrained(name, "float32").state_dict()
    own = base.state_dict()
    shapes, others = ({key: value.shape for key, value in state.items()} for state in (own, other))
    if shapes != others:
        odd = min(key for key in {*shapes, *others} if shapes.get(key) != others.get(key))
        raise ValueError(f"--drift={name}: it has another architecture ({odd}); gists would not fit it")
    base.load_state_dict(other)


def _train(base: BaseLM, windows: Iterable[Tensor]) -> None:
    """Next-token training on windows [B, T]; the base LM is frozen again afterwards."""
    base.requires_grad_(True)
    optimizer = torch.optim.AdamW(base.parameters(), lr=LR)
    with torch.enable_grad(), torch.inference_mode(False):
        for ids in windows:
            logits = base.logits(base(base.embed(ids), None)[:, :-1])
            optimizer.zero_grad()
            F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
            optimizer.step()
    base.freeze()


def _windows(base: BaseLM, steps: int, seed: int) -> Iterator[Tensor]:
    tokens = min(WINDOW, base.max_positions)
    documents, _ = cut(tokenised(Embedded(), base.tokenizer), TRAIN, base.tokenizer, tokens, tokens)
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        chosen = [documents[int(i)]["input_ids"] for i in rng.integers(len(documents), size=BATCH)]
        yield torch.from_numpy(np.stack(chosen)).to(base.model.device)
