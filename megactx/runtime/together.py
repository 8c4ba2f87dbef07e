"""The next token of many sessions in one pass of their base: its weights are read once for all of them.

A lazy stream puts a pushed token off until somebody asks what follows it. Whoever has several such streams, as a server
has, calls ``read_together`` before. What a session says is what it would say alone, but for rounding.
"""

import time
from collections.abc import Iterable

import torch

from .incremental_prefill import IncrementalPrefill
from .stream import Stream


@torch.no_grad()
def read_together(streams: Iterable[Stream]) -> int:
    """Read for each stream the one token that it has put off, with the logits of what follows; -> how many were read.

    Streams of several rows, of another base or attention than the first, with CUDA graphs, with columns that are
    not there, or with more to read than that token are left alone, and so is one by itself: they read when they are
    asked.
    """
    ready, found = [], []
    for stream in dict.fromkeys(streams):
        if not isinstance(stream, Stream) or stream.rows > 1 or stream.settings.graphs:
            continue
        if isinstance(stream.prefill, IncrementalPrefill) and not stream.prefill.whole:
            continue
        if ready and (stream.base is not ready[0].base or type(stream.prefill) is not type(ready[0].prefill)):
            continue
        if stream.unread == 1 and (new := stream.put_off()) is not None:
            ready.append(stream)
            found.append(torch.stack([part[0, 0] for part in new]))
    if len(ready) < 2:
        return 0
    began = time.perf_counter()
    ids, positions = torch.stack(found).unbind(1)
    try:
        hidden = type(ready[0].prefill).step_each([stream.prefill for stream in ready], ids, positions)
    except BaseException:
        for stream in ready:
            stream.hidden = None  # all is read again
        raise
    logits = ready[0].base.logits(hidden).float()
    seconds = (time.perf_counter() - began) / len(ready)
    for n, stream in enumerate(ready):
        stream.took_up(hidden[n : n + 1, None], logits[n : n + 1], seconds)
    return len(ready)
