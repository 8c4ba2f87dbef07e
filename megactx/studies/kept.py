"""What a study has measured already: scores of each document in a file, so that one that was stopped goes on."""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from megactx.evaluation.scores import BlockScores
from megactx.framework.bar import bar
from megactx.lm import BaseLM
from megactx.lm.identity import of_net, of_weights, raw


def identity(base: BaseLM, nets: dict[str, torch.nn.Module], **settings) -> dict:
    """What scores depend on beside the text: the base LM, the nets by name, their block sizes, and settings."""
    told = {name: [net.block_size, of_net(net)] for name, net in nets.items()}
    return {"base": of_weights(base), "nets": told} | settings


def kept(folder: Path, of: dict, batches: Iterable[dict], measured: Callable[[list[dict]], BlockScores]) -> BlockScores:
    """Scores of batches: read where they are, measured and written where they are not.

    A file is named by all that its scores depend on but the code, so other settings, nets or texts never meet in one.

    Args:
        folder: of the files; made if need be. Its name is that of the progress bar.
        of: see ``identity``.
        batches: dicts ``ids``, ``lengths``, ``block_starts``, see ``measure``.
        measured: batches -> their scores.

    Raises:
        ValueError: a file is damaged; the message names it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for batch in bar(folder.name)(list(batches)):
        digest = hashlib.sha256(json.dumps(of, sort_keys=True).encode())
        for name in ("ids", "lengths", "block_starts"):
            digest.update(f"{name} {list(batch[name].shape)}".encode())
            digest.update(raw(batch[name]))
        path = folder / f"{digest.hexdigest()[:16]}.safetensors"
        if not path.with_suffix(".json").exists():  # the second of the two files that are written
            measured([batch]).save(path)
        parts.append(BlockScores.load(path))
    return BlockScores.concatenate(parts)
