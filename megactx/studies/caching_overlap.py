"""Do gists continue as the prompt itself would? ROUGE-L between greedy continuations (Lin 2004; Mu et al. 2023).

The reference is the base LM's own continuation of the full prompt, so 1 is the same words in the same order. Greedy
continuations part at the first token that differs, so what matters is the distance to the control, nothing in place.
"""

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torchmetrics.functional.text import rouge_score

from megactx.evaluation.bootstrap import mean_interval
from megactx.evaluation.table import Table
from megactx.gist.carrier import Compressor
from megactx.lm import BaseLM
from megactx.lm.prefill import prefill

from .prompts import cached, compressed, greedy

BATCH = 8  # prompts at once


def measure_overlap(
    base: BaseLM,
    nets: Mapping[str, Compressor],
    batches: Iterable[dict],
    tokens: int,
    answer: int,
    levels: Mapping[float, int],
    table: Table,
    progress: Callable[[Iterable], Iterable] = iter,
) -> dict:
    """Continue prompts greedily, in full and with their oldest blocks compressed.

    Args:
        nets: name -> compressor.
        batches: documents of the same length as batches of one, ``ids`` [1, T + A] and ``document`` [1]: the prompt,
            and the input that is read raw behind it.
        tokens: T of the prompt.
        answer: tokens to continue by.
        levels: compression -> blocks that are compressed, see ``prompts.levels``.
        table: gets ``rouge`` of each carrier and compression (a span), with its interval (bootstrap over texts);
            undefined where nothing is left.

    Returns:
        ``prompts``; ``without_words``, those whose full continuation has no word and that are left out, for nothing
        overlaps with it.
    """
    batches = list(batches)
    ids = torch.cat([batch["ids"] for batch in batches]).to(base.model.device)
    texts = torch.cat([batch["document"] for batch in batches])
    full, own = [], {(name, compression): [] for name in nets for compression in levels}
    for part in progress(ids.split(BATCH)):
        prompt, rest = part[:, :tokens], part[:, tokens:]
        read = prefill(base, prompt, any(net.needs_hidden for net in nets.values()))
        full += _words(base, greedy(base, cached(base, read), rest, answer))
        for name, net in nets.items():
            for compression, count in levels.items():
                kept = compressed(base, net, read, count)["keys"]
                own[name, compression] += _words(base, greedy(base, kept, rest, answer))
    some = [index for index, text in enumerate(full) if re.search("[a-z0-9]", text.lower())]
    for (name, compression), found in own.items():
        scores = torch.tensor([rouge_l(found[index], full[index]) for index in some])
        value = mean_interval(texts[some], scores) if some else None
        table.add("rouge", value, carrier=name, span=compression, n=len(some))
    return {"prompts": len(full), "without_words": len(full) - len(some)}


def rouge_l(text: str, reference: str) -> float:
    """F of the longest common subsequence of words, 0 to 1."""
    return float(rouge_score(text, reference, rouge_keys="rougeL")["rougeL_fmeasure"])


def _words(base: BaseLM, ids: Tensor) -> list[str]:
    return base.tokenizer.batch_decode(ids, skip_special_tokens=True)
