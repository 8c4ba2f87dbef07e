"""What is left of a history whose old blocks are all compressed (method 3, 5).

    history recovery      1 - (NLL_carriers - NLL_full) / (NLL_nothing - NLL_full)
    gain at equal budget  NLL of as many more raw tokens as there are carriers - NLL_carriers

Nothing: the sink and the same R raw tokens. Every number is over the same S tokens.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from megactx.data.segments import RECENCY, SEGMENT, eligible_segments
from megactx.gist.history import check_segments, old_blocks, with_carriers, with_everything, with_nothing
from megactx.lm import BaseLM
from megactx.lm.chunked_head import score_exactly
from megactx.lm.eval_mode import in_eval_mode
from megactx.lm.prefill import blocks, prefill

from .measure import scores_of
from .passages import documents_with
from .scores import MORE_RAW, BlockScores


def segments(batches: Iterable[dict], block: int, count: int | None, segment: int = SEGMENT, recency: int = RECENCY):
    """Batches of one document whose ``block_starts`` are segments: ``count`` at most, evenly spaced; ``None``: all.

    Segments of one document do not overlap.
    """
    apart = -(-segment // block)

    def starts_of(length):
        return eligible_segments(length, block, segment, recency)[::-1][::apart][::-1].copy()

    return documents_with(batches, starts_of, count)


@torch.inference_mode()
def measure_history(
    base: BaseLM,
    compressors: Mapping[str, torch.nn.Module],
    batches: Iterable[dict],
    segment: int = SEGMENT,
    recency: int = RECENCY,
    progress: Callable[[Iterable], Iterable] = iter,
) -> BlockScores:
    """Score segments over the sink, carriers of all older blocks and R raw tokens, with each compressor.

    Args:
        base: the frozen base LM.
        compressors: name -> ``Compressor``, all of one block size, measured in eval mode.
        batches: as ``segments`` makes them: dicts ``ids`` [1, T], ``lengths`` [1], ``block_starts`` [1, N], ``domain``,
            ``document``.
        segment, recency: S and R, tokens.
        progress: wraps the batches, to show a bar.

    Returns:
        ``BlockScores`` with a row per segment and S columns. ``drop`` is the history without carriers, so its recovery
        is history recovery; the carrier ``MORE_RAW`` has as many more raw tokens as there are compressed blocks.

    Raises:
        ValueError: a segment that is not eligible, or block sizes that differ.
    """
    sizes = {net.block_size for net in compressors.values()}
    if len(sizes) > 1:
        raise ValueError(f"history: the compressors have block sizes {sorted(sizes)}, one is needed")
    (block,) = sizes
    needs_hidden = any(getattr(net, "needs_hidden", False) for net in compressors.values())
    device, parts = base.model.device, []
    with in_eval_mode(*compressors.values()):
        for batch in progress(list(batches)):
            ids, starts = batch["ids"].to(device), batch["block_starts"].to(device)
            check_segments(starts, batch["lengths"].to(device), block, segment, recency)
            read = prefill(base, ids, needs_hidden)
            old, sizes = old_blocks(starts, block, recency), (block, segment, recency)
            rows = {
                name: with_carriers(base, read, starts, net.compress(base, read, old), *sizes)
                for name, net in compressors.items()
            }
            rows[MORE_RAW] = _more_raw(base, read, starts, *sizes)
            rows["nothing"] = with_nothing(base, read, starts, *sizes)
            numbers = score_exactly(
                base,
                torch.stack(list(rows.values())).flatten(1, 3),
                with_everything(read, starts, segment).flatten(0, 2),
                blocks(ids, starts, segment).flatten(),
            )
            parts.append(scores_of(batch, starts, numbers, list(rows)[:-1]))
    return BlockScores.concatenate(parts)


def _more_raw(base, prefill, starts: Tensor, block: int, segment: int, recency: int) -> Tensor:
    """Each segment has another number of compressed blocks, so another number of raw tokens instead: one by one."""
    each = []
    for n in range(starts.shape[1]):
        counts = (starts[:, n] - recency) // block - 1
        assert (counts == counts[0]).all(), "one document per batch"
        each.append(with_nothing(base, prefill, starts[:, n : n + 1], block, segment, recency + int(counts[0])))
    return torch.cat(each, dim=1)
