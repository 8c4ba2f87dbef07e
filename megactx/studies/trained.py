"""Finished runs as a study takes them: their base LM, their carriers, and held-out text to measure them on."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor

from megactx.data.embedded import Embedded
from megactx.data.files import DOMAINS, Files
from megactx.data.segments import RECENCY
from megactx.data.spans_module import SpanData
from megactx.framework.run.resume import best, read
from megactx.gist.carrier import Compressor, KVSlots
from megactx.lm import BaseLM
from megactx.lm.prefill import Prefill
from megactx.stages.gist import GistStage

NOTHING = "nothing"


class Nothing(Compressor):
    """The drop control in the form of a carrier: keys and values of no column at all."""

    makes_vectors = False

    def compress(self, base: BaseLM, prefill: Prefill, starts: Tensor) -> KVSlots:
        return KVSlots([tuple(part[:, :, :0] for part in layer) for layer in prefill.cache])


@dataclass(frozen=True)
class Trained:
    """A finished run of a gist stage: ``nets`` are its compressor, first, and the controls that learned beside it."""

    folder: Path
    name: str
    base: BaseLM
    nets: dict[str, Compressor]
    horizon: int
    recency: int  # tokens
    weights: dict[str, float]  # domain -> share of the training documents
    base_name: str

    @property
    def main(self) -> Compressor:
        return next(iter(self.nets.values()))

    @property
    def block_size(self) -> int:
        """K, tokens."""
        return self.main.block_size


def load(folders: Iterable[str | Path]) -> list[Trained]:
    """Runs from their folders, each from its best checkpoint; the base LM in fp32, on the GPU where there is one.

    Runs of one base LM share its weights.

    Raises:
        ValueError: there is no checkpoint in a folder, or it is of another stage.
    """
    paths, runs = [Path(folder) for folder in folders], []
    counts = Counter(path.resolve().name for path in paths)
    for path in paths:
        here = path.resolve()
        name = here.name if counts[here.name] == 1 else f"{here.parent.name}/{here.name}"
        runs.append(_load(path, name))
        first = next(run for run in runs if run.base_name == runs[-1].base_name)
        for own, shared in zip(runs[-1].base.parameters(), first.base.parameters(), strict=True):
            own.data = shared.data
    return runs


def same(runs: Iterable) -> None:
    """Runs that are compared have one base LM and one block size.

    Raises:
        ValueError: they differ.
    """
    for what, attribute in (("base.name", "base_name"), ("block_size", "block_size")):
        values = [(run.name, getattr(run, attribute)) for run in runs]
        if len({value for _, value in values}) > 1:
            told = ", ".join(f"{name}: {value}" for name, value in values)
            raise ValueError(f"the runs differ in {what} ({told}); give runs of one {what} at a time")


def held_out(base: BaseLM, path: str | None, block: int, horizon: int, tokens: int, blocks: int) -> list[dict]:
    """Documents of exactly ``tokens`` tokens that no run was trained on, as batches of one that ``measure`` takes.

    Args:
        path: files, see ``Files``; ``None``: the held-out tenth of the embedded text.
        block, horizon: K and H.
        blocks: about so many block starts in all, from at least 50 documents where there are so many.

    Raises:
        ValueError: the base LM does not take documents that long, or no text is that long.
    """
    if tokens > base.max_positions:
        raise ValueError(f"documents of {tokens} tokens are asked for, but the base takes {base.max_positions}")
    source = Files(path) if path else Embedded()
    sizes = {"min_tokens": tokens, "max_tokens": tokens, "batch": 1, "spans": 1, "weights": dict.fromkeys(DOMAINS)}
    data = SpanData(source, base.tokenizer, block, horizon, **sizes)
    return data.held_out(source, blocks) if path else data.evaluation_documents(blocks)


def checkpoint_of(folder: Path) -> tuple[Path, dict]:
    """Where the best checkpoint of a run is, and what it holds.

    Raises:
        ValueError: there is no such folder, or no checkpoint in it.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such run folder")
    path = best(folder)
    return path, read(path)


def base_of(name: str) -> BaseLM:
    """A frozen base LM in fp32, on the GPU where there is one."""
    return BaseLM.from_pretrained(name, "float32").freeze().to(device())


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _load(folder: Path, name: str) -> Trained:
    path, checkpoint = checkpoint_of(folder)
    if "controls" not in (settings := checkpoint["hyper_parameters"]):
        raise ValueError(f"{folder}: it is no run of a gist stage")
    stage = GistStage.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    stage.to(device()).eval()
    stage.base.to(torch.float32)  # probes and greedy decoding ask for the argmax: rounding must not decide it
    # Of a run of earlier days the stage itself had history mode.
    history = settings.get("losses", {}).get("history") or settings.get("history") or {}
    config = folder / "config.yaml"
    data = (yaml.safe_load(config.read_text()) if config.exists() else {}).get("data", {})
    return Trained(
        folder=folder,
        name=name,
        base=stage.base,
        nets=dict(stage.nets),
        horizon=settings["horizon"],
        recency=history.get("recency", RECENCY),
        weights={domain: share for domain, share in (data.get("weights") or {}).items() if share},
        base_name=settings["base"]["name"],
    )
