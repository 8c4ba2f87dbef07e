"""The ladder: every way to compress a block, on the same blocks, trained in the same run (method 5, 6).

    python -m megactx.studies.ladder preset=quick                       train all carriers, measure, tables and pictures
    python -m megactx.studies.ladder base.name=FOLDER data=files data.path=TEXTS      the same for any model and text
    python -m megactx.studies.ladder RUN [RUN ...]                      several finished runs, such as seeds, as one

It is ``train.py experiment=ladder``: a gist stage whose controls are the other carriers. They see the same blocks, the
same teacher pass, the same steps. Its settings are those of ``train.py --help``.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TypedDict

import torch

from megactx.data.files import Files
from megactx.evaluation.history import measure_history, segments
from megactx.evaluation.measure import measure, untrained
from megactx.framework import command_line
from megactx.framework.bar import bar
from megactx.framework.config.types import Count, Whole
from megactx.gist.carriers.avgpool import AvgPool
from megactx.gist.carriers.history_oracle import HistoryOracle
from megactx.gist.carriers.oracle import Oracle
from megactx.lm.prefill import prefill
from megactx.stages.gist import GistStage

from .ladder_report import report_of, rungs

ORACLES = {"oracle-transfer": 8, "oracle-fit": 0}  # name -> continuations that it is fitted on; 0: the true one


class Oracles(TypedDict):
    """How many blocks and histories get vectors of their own, and the steps of each fit."""

    oracle: Whole
    history_oracle: Whole
    oracle_steps: Count


class Ladder(GistStage):
    """A gist stage that ends with the ladder.

    Args:
        ladder: ``oracle``: blocks that get a fitted vector each, 0 for none; ``history_oracle``: histories whose
            vectors are fitted together, 0 for none; ``oracle_steps``: of each fit.
        settings: of ``GistStage``; its ``evaluate.blocks`` and ``evaluate.history`` are the ladder's too.

    Raises:
        ValueError: another attention than the plain one.
    """

    # All rungs are measured behind their last step: a checkpoint that the subject's validation chose would favour it.
    monitor, reports_best = None, False

    def __init__(self, ladder: Oracles, **settings):
        super().__init__(**settings)  # which also saves what it does not know as hyperparameters
        if self.attention.kind != "plain":
            raise ValueError(
                f"attention.kind={self.attention.kind} is not allowed in a ladder: its rungs are measured under plain"
                " attention; set it to plain"
            )

    @torch.inference_mode()
    def finish(self, folder: Path, datamodule) -> None:
        count, path = self.hparams.evaluate["blocks"], self.hparams.evaluate["path"]
        batches = datamodule.held_out(Files(path), count) if path else datamodule.evaluation_documents(count)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.base.model.dtype == torch.bfloat16):
            numbers = self._measure(batches)
        report = report_of([numbers])
        report.show()
        print(report.write(folder / "ladder", {"runs": [numbers]}))

    def _measure(self, batches: list[dict]) -> dict:
        evaluate, ladder, horizon = self.hparams.evaluate, self.hparams.ladder, self.hparams.horizon
        block = self.main.block_size
        nets = dict(self.nets) | {"avgpool": AvgPool(block), "avgpool at the end": AvgPool(block, "end")}
        scores = measure(self.base, nets, batches, horizon, progress=bar("all carriers, one block at a time"))
        parts = {"span": scores, "history": None, "oracle": None, "history oracle": None}
        settings = {"position": self.main.position, "steps": ladder["oracle_steps"]}
        sizes = dict(zip(("segment", "recency"), self.windows, strict=True))
        rest = nets | untrained(self.base, block, self.main.position)
        if evaluate["history"] and (found := segments(batches, block, evaluate["history"], **sizes)):
            parts["history"] = measure_history(self.base, rest, found, **sizes, progress=bar("histories"))
        # One segment of each document: it is fitted to all of its old blocks at once.
        if (count := ladder["history_oracle"]) and (found := segments(batches, block, count, **sizes)):
            found = [batch | {"block_starts": batch["block_starts"][:, -1:]} for batch in found]
            fitted = {
                name: HistoryOracle(**sizes, block_size=block, samples=samples, **settings)
                for name, samples in ORACLES.items()
            }
            parts["history oracle"] = measure_history(
                self.base, rest | fitted, found, **sizes, progress=bar("vectors fitted to every history")
            )
        if ladder["oracle"]:
            fitted = {name: Oracle(horizon, block, samples=count, **settings) for name, count in ORACLES.items()}
            some = first_blocks(batches, ladder["oracle"])
            parts["oracle"] = measure(
                self.base, nets | fitted, some, horizon, progress=bar("a vector fitted to every block")
            )
        about = {name: self._about(net) for name, net in (nets | untrained(self.base, block, "end")).items()}
        return rungs(parts, about, next(iter(self.nets)), block, self.hparams.base["name"])

    def _about(self, net) -> dict:
        """Bytes per source token, trained parameters, and whether it keeps a vector or keys and values."""
        ids = torch.zeros(1, 2 * net.block_size, dtype=torch.long, device=self.device)
        starts = torch.full((1, 1), net.block_size, device=self.device)
        carrier = net.compress(self.base, prefill(self.base, ids, with_states=True), starts)
        return {
            "bytes_per_token": carrier.bytes_per_block() / net.block_size,
            "parameters": sum(p.numel() for p in net.parameters() if p.requires_grad),
            "first": carrier.first,
        }


def first_blocks(batches: list[dict], count: int) -> list[dict]:
    """The first block of each document, then the second, until there are ``count``: as many documents as possible."""
    each = -(-count // len(batches))
    kept = [batch | {"block_starts": batch["block_starts"][:, :each]} for batch in batches]
    return kept[: -(-count // each)]


def main(arguments: list[str] | None = None) -> int:
    """The command line; -> exit codes as those of ``train.py``."""
    from megactx.framework.app import run

    arguments = sys.argv[1:] if arguments is None else arguments
    helps = {"-h", "--help"} & {*arguments}
    if not helps and all("=" in argument or argument.startswith("-") for argument in arguments):
        return run(["experiment=ladder", *arguments])
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m megactx.studies.ladder", description=__doc__, formatter_class=plain)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="finished runs to combine")
    return command_line.run(combined, parser, arguments)


def combined(args: argparse.Namespace) -> None:
    """Show finished ladders as one; several are written beside the first run."""
    if any("=" in run for run in args.runs):
        raise ValueError("give run folders to combine, or settings of a new run, not both")
    found = [read_ladder(Path(run)) for run in args.runs]
    report = report_of(found)
    report.show()
    if len(found) > 1:
        print(report.write(Path(args.runs[0]).parent / "ladder", {"runs": found}))


def read_ladder(folder: Path) -> dict:
    """The numbers of a finished ladder, see ``rungs``.

    Raises:
        ValueError: there is none in the folder.
    """
    path = folder / "ladder.json"
    if not path.exists():
        raise ValueError(f"{folder}: there is no ladder.json in it; a run of experiment=ladder writes one at its end")
    return json.loads(path.read_text())["runs"][0]


if __name__ == "__main__":
    sys.exit(main())
