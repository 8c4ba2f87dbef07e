"""What a prompt costs that is used again: FLOPs and time of an answer, bytes kept, and what the carriers cost once.

FLOPs are measured (``framework.callbacks.flops``), of attention all columns, masked or not. Time is wall clock: the
forms take turns, and the median of the repeats counts, so that other work on the machine meets all of them alike.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from statistics import median

import torch
from torch import Tensor

from megactx.evaluation.table import Table
from megactx.framework.callbacks.flops import Counter
from megactx.gist.carrier import Compressor
from megactx.lm import BaseLM
from megactx.lm.prefill import prefill, unread

from .prompts import Prompt, compressed, filled, greedy


def flops(call: Callable[[], object]) -> int:
    """Floating-point operations of a call."""
    with torch.no_grad(), Counter() as counter:
        call()
    return int(counter.total)


def measure_answers(
    base: BaseLM,
    prompts: Mapping[str, Prompt],
    ids: Tensor,
    tokens: int,
    repeats: int,
    progress: Callable[[Iterable], Iterable] = iter,
) -> dict[str, dict]:
    """What it costs to read an input ids [1, A] behind each form of one prompt and to answer ``tokens`` tokens.

    Returns:
        Form -> ``entries``, ``bytes``; ``flops``, ``seconds`` up to the first token of the answer, ``answer_flops``,
        ``answer_seconds`` up to its last; medians.
    """
    calls = {
        (name, count): lambda prompt=prompt, count=count: greedy(base, prompt, ids, count)
        for name, prompt in prompts.items()
        for count in dict.fromkeys((1, tokens))
    }
    spent = {key: [] for key in calls}
    for turn in progress(range(-1, repeats)):  # the first turn warms up
        for key, call in calls.items():
            began = _now(base)
            call()
            if turn >= 0:
                spent[key].append(_now(base) - began)
    return {
        name: {
            "entries": prompt.entries,
            "bytes": prompt.stored,
            "flops": flops(calls[name, 1]),
            "seconds": median(spent[name, 1]),
            "answer_flops": flops(calls[name, tokens]),
            "answer_seconds": median(spent[name, tokens]),
        }
        for name, prompt in prompts.items()
    }


def measure_making(base: BaseLM, nets: Mapping[str, Compressor], ids: Tensor, table: Table) -> None:
    """What each carrier costs once, for all blocks of a prompt ids [1, T], and what is then kept.

    Adds to the table, of each carrier: ``made_flops`` of what is kept smallest: vectors where it makes them, else keys
    and values; ``keys_flops`` of its keys and values; ``vector_bytes`` (not without vectors), ``key_bytes`` of a block.
    """
    for name, net in nets.items():
        k = net.block_size
        starts = torch.arange(k, ids.shape[1] // k * k, k, device=ids.device)[None]
        forms = compressed(base, net, prefill(base, ids, net.needs_hidden), starts.shape[1])
        made = keys = flops(partial(_make, base, net, ids, starts))
        if "vectors" in forms:
            keys += flops(partial(filled, base, forms["vectors"]))
            table.add("vector_bytes", _make(base, net, ids, starts).bytes_per_block(), carrier=name)
        table.add("made_flops", made, carrier=name)
        table.add("keys_flops", keys, carrier=name)
        table.add("key_bytes", forms["keys"].stored // forms["keys"].entries, carrier=name)


@torch.no_grad()
def _make(base: BaseLM, net: Compressor, ids: Tensor, starts: Tensor):
    reads = net.needs_hidden or not net.makes_vectors
    return net.compress(base, prefill(base, ids, net.needs_hidden) if reads else unread(ids), starts)


def _now(base: BaseLM) -> float:
    if base.model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
