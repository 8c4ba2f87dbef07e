"""Whether a readout foretells the next gist of texts that nobody trained on: its rank beside three controls.

python -m megactx.studies.prediction RUN --path TEXTS              RUN: of experiment=mega_prediction
python -m megactx.studies.prediction --path TEXTS                  the readout of the embedded models
python -m megactx.studies.prediction smollm2 --path TEXTS          that of another asset or export
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from megactx.evaluation.bootstrap import mean_interval
from megactx.evaluation.prediction import NOTHING, Text, measure, provisional, report
from megactx.evaluation.prediction_worth import FEWEST, correlations, signals
from megactx.evaluation.table import Report
from megactx.framework.bar import bar
from megactx.memory.prediction import example_of
from megactx.parts.models import Models, load_models
from megactx.stages.prediction import PredictionStage

from .study import Options, command, usable
from .trained import checkpoint_of, device, held_out

HORIZON, SHARE = 32, 0.25  # of the worth: tokens behind a window, its entries over its tokens
EVERY = 10**6  # blocks: of all documents


def options(given: Options) -> None:
    given.add("model", nargs="?", metavar="MODEL", help="a run, an asset or an export; without it the embedded models")
    given.path()
    given.number("tokens", 2048, "of a document", least=128)
    given.number("documents", 60, "documents", least=2)
    given.number("entries", 0, "documents in which foretold gists stand before their blocks, for their NLL", least=0)
    given.number("worth", 0, "documents in which the worth of opening each block is measured beside it", least=0)
    given.number("seed", 0, "of the draw of other texts' gists", least=0)
    given.add("--out", type=Path, default=Path("prediction"), help="folder of the tables")


def study(args: argparse.Namespace) -> Iterator[tuple[Path, Report]]:
    """Read the texts, rank.

    Raises:
        ValueError: there is no readout, or no text that is long enough.
    """
    stem = usable(args.out) / "prediction"
    if max(args.worth, args.entries) > args.documents:
        raise ValueError(
            f"--worth={args.worth}, --entries={args.entries}: allowed is at most --documents={args.documents}"
        )
    stage = stage_of(args.model)
    models = models_of(args.model, stage)
    if stage and stage.reader is not None and (args.worth or args.entries):
        raise ValueError(f"RUN={args.model}: --worth and --entries are not allowed, its base LM has no GistNet")
    if (readout := models.prediction) is None:
        raise ValueError(f"RUN={args.model}: there is no readout for it; train one with experiment=mega_prediction")
    base, net = models.base, models.gistnet
    batches = held_out(base, args.path, net.block_size, 1, args.tokens, EVERY)[: args.documents]
    texts = []
    for batch in bar("documents")(batches):
        ids = batch["ids"][0].to(base.model.device)
        with torch.no_grad():
            example = stage.read_by(ids)[0] if stage else example_of(base, net, ids, readout.levels).float()
        texts.append(Text(example, batch["domain"][0]))
    table = measure(readout, texts, args.seed)
    for name, interval in entries(base, net, readout, batches[: args.entries]).items():
        table.add("entry", interval, carrier=name)
    for name, intervals in worth(base, net, readout, batches[: args.worth]).items():
        for metric, interval in intervals.items():
            table.add(f"worth_{metric}", interval, carrier=name, span="worth")
    about = {"model": args.model, "path": args.path, "tokens": args.tokens, "seed": args.seed}
    yield stem, report(table, "What the next gist is", about, len(texts))


def entries(base, net, readout, batches: list[dict]) -> dict:
    """NLL of a block's tokens with an entry before it, less that without one; over texts."""
    found = [
        provisional(base, readout, net, batch["ids"][0].to(base.model.device)) for batch in bar("entries")(batches)
    ]
    if not found:
        return {}
    owner = torch.cat([torch.full((one[NOTHING].numel(),), number) for number, one in enumerate(found)])
    arms = {name: torch.cat([(one[name] - one[NOTHING]).flatten() for one in found]) for name in found[0]}
    return {name: mean_interval(owner, values) for name, values in arms.items() if name != NOTHING}


def worth(base, net, readout, batches: list[dict]) -> dict:
    """Rank correlations of what is expected next with what opening a block is worth; over texts."""
    found = []
    for batch in bar("worth of blocks")(batches):
        ids = batch["ids"][0, : base.max_positions].to(base.model.device)
        found.append(signals(base, readout, net, ids, HORIZON, SHARE))
    found = [text for text in found if text is not None]
    if batches and not found:
        raise ValueError(f"--tokens: no text has {FEWEST} blocks of one gist in its window; take longer ones")
    return correlations(found) if found else {}


def models_of(model: str | None, stage: PredictionStage | None = None) -> Models:
    """Base LM, GistNet and readout of a run of ``experiment=mega_prediction``, or what ``load_models`` takes.

    Args:
        stage: of that run, where it is there already.

    Raises:
        ValueError: it is the run of another stage.
    """
    if (stage := stage or stage_of(model)) is None:
        return load_models(model, setting="MODEL")
    return Models(stage.base, stage.gistnet, name=model, prediction=stage.readout)


def stage_of(model: str | None) -> PredictionStage | None:
    """The stage of a run folder from its best checkpoint, in fp32; ``None``: it is no run folder.

    Raises:
        ValueError: it is the run of another stage.
    """
    if not model or not (Path(model) / "checkpoints").is_dir():
        return None
    path, checkpoint = checkpoint_of(Path(model))
    if "readout" not in checkpoint["hyper_parameters"]:
        raise ValueError(f"RUN={model}: it is no run of experiment=mega_prediction")
    stage = PredictionStage.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    stage.set_dtype(torch.float32)  # ranks and greedy tokens ask for the largest: rounding must not decide it
    return stage.to(device()).eval()


main = command("prediction", __doc__, options, study)

if __name__ == "__main__":
    sys.exit(main())
