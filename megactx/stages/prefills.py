"""Prefills of a run's training documents, made before the run: in this process, or on all hosts by the workers of Ray.

    python -m megactx.stages.prefills --engine ray experiment=smollm2 data.path=my_texts
    python train.py experiment=smollm2 data.path=my_texts

The settings are those of the run. Each document is a file in $MEGACTX_CACHE, with the same bits whoever made it; the
run finds it there. Where hosts share no disk, the command is given on each: it fills a cache of its own.
"""

import argparse
import functools
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from megactx.data.documents import cache_folder, length_of
from megactx.data.encoding import batches
from megactx.data.spans import SpanBatches
from megactx.framework.bar import quiet_libraries
from megactx.framework.command_line import run
from megactx.framework.config.search_path import compose, reference
from megactx.framework.config.validate import validate
from megactx.framework.errors import composition_message
from megactx.framework.run import device
from megactx.framework.workers import Counted, add_engine, workers
from megactx.lm import BaseLM
from megactx.lm.prefill_cache import PrefillCache

SHARD = 2**16  # tokens that a worker reads for a result
ROOM = 1e9  # gigabytes: that there is room was seen before


@dataclass(frozen=True)
class Pass:
    """How a base LM reads documents, and where that is kept.

    Attributes:
        base, dtype: name of the base LM, and of its numbers as it is loaded.
        accelerator, half: cpu or cuda; whether it reads in bf16, as with ``trainer.precision=bf16-mixed``.
        kept, layers, place: of ``PrefillCache``.
    """

    base: str
    dtype: str | None
    accelerator: str
    half: bool
    kept: str
    layers: tuple[int, ...]
    place: Path


def fill(args: argparse.Namespace) -> None:
    """The command.

    Raises:
        ValueError: a setting; or the run keeps no prefills, or none that are known before.
        RunFailed: the disk is full, or the worker of a shard was lost each time.
    """
    quiet_libraries()
    cfg, choices = composed(args.overrides)
    if not cfg.stage.get("prefills"):
        raise ValueError("stage.prefills: this stage keeps no prefills of its training documents; name one that does")
    if not cfg.stage.prefills.gigabytes:
        raise ValueError("stage.prefills.gigabytes=0 keeps none: set how many gigabytes of the disk they may take")
    trainer = cfg.trainer
    found = device.choose(trainer.accelerator, trainer.precision, 1, choices["trainer"])
    stage, data = (instantiate(part, _convert_="all") for part in (cfg.stage, cfg.datamodule))
    stage.prepare(data)
    data.setup("fit")
    how = Pass(
        stage.hparams.base["name"],
        stage.hparams.base.get("dtype"),
        found.accelerator,
        found.precision.startswith("bf16"),
        cfg.stage.prefills.dtype,
        tuple(stage.kept_layers),
        (cache_folder() / "prefills").absolute(),
    )
    stage.set_dtype(torch.bfloat16 if how.half else torch.float32)
    cache = PrefillCache(stage.base, cfg.stage.prefills.gigabytes, how.kept, how.layers, how.place)
    if data.training.compose is not None:
        raise ValueError(
            "datamodule.interleave and datamodule.adversarial make documents anew for each step, so that none is known"
            " before: set both to 0"
        )
    there, missing = sorted_out(data.training, cache)
    ends, room = np.cumsum([length_of(document) for document in missing]), cache.room // cache.bytes_per_token()
    fits = int(np.searchsorted(ends, room, "right"))
    groups = [*batches(missing[:fits], length_of, SHARD)]
    shards = Counted(((how, [ids_of(document) for document in group]) for group in groups), len(groups))
    began = time.monotonic()
    with workers(args.engine) as each:
        tokens = sum(each(read, shards, "prefills"))
    print(
        f"{fits:,} documents of {tokens:,} tokens were read in {time.monotonic() - began:.0f} s; {there:,} were there,"
        f" {len(missing) - fits:,} have no room. They are in {cache.folder}"
    )


def composed(overrides: list[str]) -> tuple[DictConfig, dict[str, str]]:
    """The config of a run, and which options it has chosen.

    Raises:
        ValueError: it cannot be composed, a setting is wrong, or it is a curriculum.
    """
    try:
        cfg = compose(overrides, with_hydra=True)
    except HydraException as error:
        raise ValueError(composition_message(error, overrides)) from error
    choices = cfg.hydra.runtime.choices
    OmegaConf.set_struct(cfg, False)
    del cfg["hydra"]
    cfg.name = cfg.folder = "prefills"  # of no run
    validate(cfg, reference(choices, cfg))
    if cfg.curriculum:
        raise ValueError("curriculum: each of its stages has documents of its own; name the experiment of one stage")
    return cfg, choices


def sorted_out(training: SpanBatches, cache: PrefillCache) -> tuple[int, list]:
    """How many training documents the cache has, and those that it has not; each once, domain by domain."""
    names, there, missing = set(), 0, []
    for document in (document for pool in training.pools.values() for document in pool):
        ids = ids_of(document)
        if (name := cache.name(ids)) in names:
            continue
        names.add(name)
        if cache.has(ids):
            there += 1
        else:
            missing.append(document)  # which has its ids on the disk
    return there, missing


def ids_of(document) -> torch.Tensor:
    """int64 [T]"""
    return torch.from_numpy(np.asarray(document["input_ids"], dtype=np.int64))


@functools.cache
def cache_of(how: Pass) -> PrefillCache:
    """Of a process, which has many shards."""
    base = BaseLM.from_pretrained(how.base, how.dtype).freeze()
    base.to(how.accelerator, torch.bfloat16 if how.half else torch.float32)
    return PrefillCache(base, ROOM, how.kept, how.layers, how.place)


def read(shard: tuple[Pass, list[torch.Tensor]]) -> int:
    """Work of a worker: documents into the cache, as a step reads them; -> how many tokens that were."""
    how, documents = shard
    with torch.autocast(how.accelerator, torch.bfloat16, enabled=how.half):
        for ids in documents:
            cache_of(how)(ids[None].to(how.accelerator), torch.tensor([len(ids)]))
    return sum(map(len, documents))


def main(arguments: list[str] | None = None) -> int:
    """The command line; -> exit code."""
    parser = argparse.ArgumentParser(prog="python -m megactx.stages.prefills", description=__doc__.partition("\n")[0])
    add_engine(parser.add_argument)
    parser.add_argument("overrides", nargs="+", metavar="SETTING", help="as of train.py: experiment=..., data.path=...")
    return run(fill, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
