"""Whether a base LM uses its context, by four measures (method 1). Where it does not, no gist can be measured.

Loss by position; what a passage gains the second time; what a missing block costs; what cutting the far context costs.
Every figure is a mean over held-out documents with a 95 % bootstrap interval over their texts. NLL in nats per token.

B batch, T tokens, W window, H horizon, K block.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from megactx.lm import BaseLM, chunked_head
from megactx.lm.masks import CAUSAL, branches

from .bootstrap import mean_interval
from .table import OVERALL, Table

POSITIONS = (1, 8, 32, 128, 256, 512, 1024, 1536, 2048, 3072, 4096, 6144)  # edges of the buckets of target positions
DISTANCES = (128, 256, 1024, 3072, 7168)  # end of the first occurrence to start of the second
PASSAGE = 256
BEFORE = 128  # tokens in front of the first occurrence, BOS included
BLOCK = 32
DROP_OFFSETS = {"0": (0, 1), "1-3": (1, 4), "4-7": (4, 8), "8-31": (8, 32)}
HORIZON = 32
BLOCKS_PER_DOCUMENT = 8
DROP_LENGTH = 1024
WINDOWS = (128, 512)
SEGMENT = 32  # targets behind a cut: they see W + 0..31 tokens
SEGMENTS_PER_DOCUMENT = 8
TOKENS_PER_PASS = 16384  # upper bound of B x T


def context_use(base: BaseLM, documents: list[dict], length: int = 4096, seed: int = 0) -> Table:
    """All four measures, see ``each_use``."""
    *_, table = each_use(base, documents, length, seed)
    return table


@torch.inference_mode()
def each_use(base: BaseLM, documents: list[dict], length: int = 4096, seed: int = 0) -> Iterator[Table]:
    """The four measures one after another: after each span a table of all so far.

    Args:
        documents: dicts with ``input_ids`` [T] that open with BOS, ``domain``, and ``text`` (the source text: the unit
            of the bootstrap), as ``megactx.data.documents.cut`` gives them. A measure uses those that are long enough.
        length: the longest window, in tokens.

    Yields:
        The long table: ``length``; and of each measure, ``loss_by_position``, ``copy_gain``, ``drop_cost``,
        ``cut_cost``, what was asked as a span, by domain and ``overall``, over n documents, with their ``std``.

    Raises:
        ValueError: no document has ``length`` tokens.
    """
    longest = max((len(document["input_ids"]) for document in documents), default=0)
    if longest < length:
        raise ValueError(f"context use: length={length}, but the longest document has {longest} tokens")
    distances = [d for d in DISTANCES if BEFORE + 2 * PASSAGE + d <= length]
    windows = [w for w in WINDOWS if BLOCK + w + SEGMENT <= length // 2]
    measured = {"loss_by_position": loss_by_position(base, documents, length), "copy_gain": {}}
    yield _table(documents, length, measured)
    for distance in distances:
        measured["copy_gain"][str(distance)] = copy_gain(base, documents, distance, PASSAGE, seed)
        yield _table(documents, length, measured)
    measured["drop_cost"] = drop_cost(base, documents, min(length, DROP_LENGTH), seed)
    yield _table(documents, length, measured)
    measured["cut_cost"] = cut_cost(base, documents, windows, length, seed)
    yield _table(documents, length, measured)


def _table(documents: list[dict], length: int, measured: dict[str, dict[str, dict[int, float]]]) -> Table:
    table = Table()
    table.add("length", length)
    for domain in (OVERALL, *dict.fromkeys(document["domain"] for document in documents)):
        for metric, spans in measured.items():
            for span, values in spans.items():
                if rows := [row for row in values if domain in (OVERALL, documents[row]["domain"])]:
                    each = torch.tensor([values[row] for row in rows], dtype=torch.float64)
                    mean = mean_interval(torch.tensor([documents[row]["text"] for row in rows]), each)._asdict()
                    mean["std"] = each.std().item() if len(each) > 1 else float("nan")
                    table.add(metric, mean, span=span, domain=domain, n=len(each))
    return table


def loss_by_position(base: BaseLM, documents: list[dict], length: int) -> dict:
    """Bucket of target positions -> {document index: NLL}; the same documents in every bucket."""
    edges = [edge for edge in POSITIONS if edge < length] + [length]
    buckets = {f"{a}-{b - 1}": (a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)}
    out = {name: {} for name in buckets}
    for rows, ids in _batches(base, documents, length):
        loss = nll(base, ids)  # [B, T - 1], column t is target t + 1
        for name, (first, end) in buckets.items():
            _put(out[name], rows, loss[:, first - 1 : end - 1].mean(1))
    return out


def copy_gain(base: BaseLM, documents: list[dict], distance: int, passage: int = PASSAGE, seed: int = 0) -> dict:
    """{document index: nats per token that a passage gains the second time}.

    ``[before, passage, the text between, passage]`` against the same with the first occurrence replaced by the text of
    the document that follows what is used: the second occurrence has the same tokens at the same positions in both.
    """
    out, second = {}, BEFORE + passage + distance
    # The window is one passage longer than what is read: its end is the control's replacement.
    for rows, ids in _batches(base, documents, second + passage, seed, most=TOKENS_PER_PASS // 2):
        first, rest = ids[:, BEFORE : BEFORE + passage], ids[:, second:]
        again = torch.cat([ids[:, :second], first], dim=1)
        without = torch.cat([ids[:, :BEFORE], rest, ids[:, BEFORE + passage : second], first], dim=1)
        loss = nll(base, torch.cat([without, again]))[:, second - 1 :].mean(1)
        control, gained = loss.chunk(2)
        _put(out, rows, control - gained)
    return out


def drop_cost(base: BaseLM, documents: list[dict], length: int, seed: int = 0) -> dict:
    """Band of offsets -> {document index: NLL without a 32-token block minus NLL with it}.

    Exactly NLL_drop of method 3: the rows behind the block keep their positions and see the text before it and
    themselves; the first target is scored from the row before the block.
    """
    from transformers import DynamicCache

    if length < 2 * BLOCK + HORIZON:
        raise ValueError(f"context use: length={length} is not allowed: at least {2 * BLOCK + HORIZON}")
    device = base.model.device
    out = {name: {} for name in DROP_OFFSETS}
    last = (length - BLOCK - HORIZON) // BLOCK
    for rows, ids in _batches(base, documents, length, seed):
        rng = np.random.default_rng([seed, *rows])
        count = min(BLOCKS_PER_DOCUMENT, last)
        starts = np.stack([np.sort(rng.choice(np.arange(1, last + 1), count, replace=False)) for _ in rows]) * BLOCK
        starts = torch.from_numpy(starts).to(device)  # [B, N]
        cache = DynamicCache(config=base.config)
        hidden = base(base.embed(ids), None, cache=cache)
        behind = starts[..., None] + BLOCK + torch.arange(HORIZON, device=device)  # targets' positions [B, N, H]
        # NLL by row: row t of the plain pass predicts target t + 1.
        full = _scored(base, _rows(hidden, behind - 1), _take(ids, behind))
        inputs = behind[..., :-1].flatten(1)  # [B, N * (H - 1)]
        mask = branches(starts, HORIZON - 1, length)
        branch = base(base.embed(ids.gather(1, inputs)), inputs, mask, cache)
        branch = branch.unflatten(1, (count, HORIZON - 1))  # [B, N, H - 1, D]
        without = torch.cat([_rows(hidden, starts[..., None] - 1), branch], dim=2)
        cost = _scored(base, without, _take(ids, behind)) - full  # [B, N, H]
        for name, (first, end) in DROP_OFFSETS.items():
            _put(out[name], rows, cost[..., first:end].mean((1, 2)))
    return out


def cut_cost(base: BaseLM, documents: list[dict], windows: Sequence[int], length: int, seed: int = 0) -> dict:
    """Window -> {document index: NLL with only the sink block and that many last tokens minus NLL with everything}.

    A fresh pass over ``[sink, window, segment]`` at the original positions. A sliding mask in one pass would not do:
    through L layers text from L windows back still reaches the row.
    """
    device, out = base.model.device, {str(window): {} for window in windows}
    for rows, ids in _batches(base, documents, length, seed) if windows else ():
        loss = nll(base, ids)
        rng = np.random.default_rng([seed, *rows])
        # From the second half, so that much is cut whatever the window.
        starts = rng.integers(length // 2, length - SEGMENT + 1, size=(len(rows), SEGMENTS_PER_DOCUMENT))
        starts = torch.from_numpy(starts).to(device)  # [B, N]
        targets = starts[..., None] + torch.arange(SEGMENT, device=device)
        full = loss.gather(1, targets.flatten(1) - 1).view_as(targets)
        for window in windows:
            _put(out[str(window)], rows, (_cut(base, ids, starts, window) - full).mean((1, 2)))
    return out


def _cut(base: BaseLM, ids: Tensor, starts: Tensor, window: int) -> Tensor:
    """NLL of the segments at starts [B, N] behind the sink block and ``window`` tokens, [B, N, S]."""
    tail = torch.arange(-window, SEGMENT - 1, device=ids.device)  # input rows, relative to the segment
    kept = starts[..., None] + tail  # [B, N, W + S - 1]
    sink = torch.arange(BLOCK, device=ids.device).expand(*kept.shape[:2], -1)
    positions = torch.cat([sink, kept], dim=2)
    targets = starts[..., None] + torch.arange(SEGMENT, device=ids.device)
    inputs, wanted = _take(ids, positions).flatten(0, 1), _take(ids, targets).flatten(0, 1)
    costs, size = [], max(1, TOKENS_PER_PASS // positions.shape[2])
    for part in range(0, len(inputs), size):
        some = slice(part, part + size)
        hidden = base(base.embed(inputs[some]), positions.flatten(0, 1)[some], CAUSAL)
        costs.append(_scored(base, hidden[:, -SEGMENT:], wanted[some]))
    return torch.cat(costs).view_as(targets)


def nll(base: BaseLM, ids: Tensor) -> Tensor:
    """ids [B, T] -> NLL of ids[:, 1:] under the plain causal pass, [B, T - 1] nats."""
    hidden = base(base.embed(ids), None)
    return _scored(base, hidden[:, :-1], ids[:, 1:])


def _scored(base: BaseLM, hidden: Tensor, targets: Tensor) -> Tensor:
    """hidden [..., D], targets [...] -> NLL [...]."""
    return chunked_head.nll(base, hidden.flatten(0, -2), targets.flatten()).view(targets.shape)


def _rows(hidden: Tensor, at: Tensor) -> Tensor:
    """hidden [B, T, D], at [B, N, R] -> [B, N, R, D]."""
    index = at.flatten(1)[..., None].expand(-1, -1, hidden.shape[-1])
    return hidden.gather(1, index).view(*at.shape, -1)


def _take(ids: Tensor, at: Tensor) -> Tensor:
    """ids [B, T], at [B, N, R] -> [B, N, R]."""
    return ids.gather(1, at.flatten(1)).view_as(at)


def _batches(base: BaseLM, documents: list[dict], length: int, seed: int | None = None, most: int = 0):
    """Yield (document indices, ids [B, length]) of the documents that are long enough.

    With a seed the window is BOS and a random slice, so that heads of files (licences, imports) are not all that is
    measured; a slice depends on (seed, document) alone.
    """
    long = [index for index, document in enumerate(documents) if len(document["input_ids"]) >= length]
    size = max(1, (most or TOKENS_PER_PASS) // length)
    for at in range(0, len(long), size):
        rows = long[at : at + size]
        windows = []
        for row in rows:
            ids = np.asarray(documents[row]["input_ids"], dtype=np.int64)
            start = 1 if seed is None else int(np.random.default_rng([seed, row]).integers(1, len(ids) - length + 2))
            windows.append(np.concatenate([ids[:1], ids[start : start + length - 1]]))
        yield rows, torch.from_numpy(np.stack(windows)).to(base.model.device)


def _put(out: dict, rows: list[int], values: Tensor) -> None:
    out.update(zip(rows, values.tolist(), strict=True))
