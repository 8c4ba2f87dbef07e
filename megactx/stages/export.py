"""A trained run as one folder that plain ``transformers`` loads: the base LM with its adapters merged, and all parts.

    python -m megactx.stages.export RUN OUT

    OUT/            a Hugging Face folder: model, config, tokenizer
    OUT/gistnet     of ``load_gistnet``
    OUT/lensnet     of ``load_lensnet``
    OUT/megactx.json  what it is, of which run, what the base LM's own perplexity lost, and a hash of every file

RUN is a run folder of a joint stage, of which the best checkpoint counts, or a checkpoint; or one of a lens stage, the
base LM of which is as it was.
"""

import argparse
import hashlib
import json
import shlex
import shutil
import sys
from pathlib import Path

import torch

from megactx.framework.command_line import run
from megactx.framework.files import replacing
from megactx.framework.run.resume import best, read
from megactx.lm import BaseLM
from megactx.lm.adapters import adapters_of, merged
from megactx.parts.read import gistnet_settings, load_gistnet, load_keys
from megactx.parts.write import save_gistnet, save_lensnet

from .alternating import AlternatingStage
from .chain_page import write_page
from .end_to_end import EndToEndStage
from .joint import JointStage
from .joint_report import in_words
from .lens import LensStage

MANIFEST = "megactx.json"
OWN = {  # stage -> settings that no other one has
    AlternatingStage: {"train_base", "cycles"},
    EndToEndStage: {"train_base", "distance"},
    LensStage: {"lensnet", "direct_lr", "windows"},
}


def load_run(path: str | Path) -> tuple[JointStage | LensStage, Path]:
    """The stage of a run in eval mode, its base LM in fp32 and on the CPU; and the checkpoint that it is from.

    Raises:
        ValueError: there is no checkpoint, or it is of no stage with a LensNet.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise ValueError(f"RUN={path}: there is no such run folder or checkpoint")
    path = best(path) if path.is_dir() else path
    settings = read(path)["hyper_parameters"]
    kind = next((stage for stage, own in OWN.items() if own <= set(settings)), None)
    if kind is None:
        raise ValueError(f"RUN={path}: it is of no joint stage; allowed are runs of alternating, end_to_end and lens")
    stage = kind.load_from_checkpoint(path, map_location="cpu", weights_only=True).eval()
    stage.base.float()
    return stage, path


def plain_base(stage: JointStage | LensStage) -> BaseLM:
    """The base LM of a run as a plain model: adapters merged, in fp32; an untouched one as it is stored."""
    if adapters_of(stage.base) or getattr(stage, "train_base", None) == "full":
        return merged(stage.base)
    return BaseLM.from_pretrained(**stage.hparams.base).freeze()


class ExportStage:
    """What a joint run has made, as one folder.

    Args:
        run: run folder or checkpoint of a joint stage.
    """

    timed, takes, gives = False, {"parts": "stage.run"}, {"model": "model"}
    stock = False
    conclude = staticmethod(write_page)

    def __init__(self, run: str):
        self.parts = run

    def run(self, folder: str | Path) -> None:
        """Write ``folder/model``."""
        final = Path(folder) / "model"
        export(self.parts, final)
        print(f"Exported to {final}\nNext: python -m megactx.apps.chat --model {shlex.quote(str(final))}")


@torch.no_grad()
def export(run: str | Path, out: str | Path, card: str = "", keys: Path | None = None) -> dict:
    """Write the folder, whole or not at all; -> the manifest.

    Args:
        card: of the model, the folder's ``README.md``.
        keys: a folder of ``save_keys`` for the same base LM, which is copied.

    Raises:
        ValueError: no run with a LensNet, or a folder that holds something else.
    """
    out = Path(out).expanduser()
    refuse_other(out)
    stage, checkpoint = load_run(run)
    base = plain_base(stage)
    made_by = f"{type(stage).__name__}, {checkpoint.parent.parent.name}"
    with replacing(out, "give another OUT") as part:
        base.model.save_pretrained(part)
        if base.tokenizer is not None:
            base.tokenizer.save_pretrained(part)
        save_gistnet(stage.gistnet, gistnet_settings(stage.hparams.gistnet), base, part / "gistnet", made_by)
        # Of the GistNet as it was written, which is what a reader of this folder has.
        saved = load_gistnet(part / "gistnet", base)
        save_lensnet(stage.lens, dict(stage.hparams.lensnet), saved, part / "lensnet", made_by)
        if keys is not None:
            load_keys(keys, base)  # refuses those of another base LM
            shutil.copytree(keys, part / "keys")
        if card:
            (part / "README.md").write_text(card, encoding="utf-8")
        manifest = _manifest(stage, checkpoint, part)
        (part / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    return manifest


def refuse_other(out: Path) -> None:
    """Raises: ValueError: the place is taken by something that is no export."""
    if out.is_file() or out.exists() and not (out / MANIFEST).is_file() and any(out.iterdir()):
        raise ValueError(f"OUT={out}: it holds something that is no export; give another folder")


def _manifest(stage: JointStage | LensStage, checkpoint: Path, folder: Path) -> dict:
    h = stage.hparams
    about = {
        "base": h.base["name"],
        "train_base": getattr(stage, "train_base", "frozen"),
        "lora": dict(h.get("lora", {})),
        "allocator": dict(h.allocator),
        "budgets": list(h.budgets),
        "block_size": stage.gistnet.block_size,
        "checkpoint": str(checkpoint),
        "step": int(read(checkpoint)["global_step"]),
        "tokens": int(getattr(stage, "tokens", 0)),
        "adapter_parameters": sum(p.numel() for p in adapters_of(stage.base).values()),
        "measured": None,  # what the run's report says of the base LM
    }
    measured = checkpoint.parent.parent / "base.json"
    if measured.is_file():
        about["measured"] = json.loads(measured.read_text())
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return about | {"files": {str(path.relative_to(folder)): _hash(path) for path in files}}


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(arguments: list[str] | None = None) -> int:
    """The command line; -> exit code."""
    parser = argparse.ArgumentParser(prog="python -m megactx.stages.export", description=__doc__.partition("\n")[0])
    parser.add_argument("run", metavar="RUN", help="run folder or checkpoint of alternating, end_to_end or lens")
    parser.add_argument("out", metavar="OUT", help="folder to write; an export that is there is replaced")
    return run(_command, parser, arguments)


def _command(args: argparse.Namespace) -> None:
    manifest = export(args.run, args.out)
    if manifest["measured"]:
        print(in_words(manifest["measured"]))
    else:
        print(f"{manifest['adapter_parameters']:,} adapter parameters; the run has no report of the base's perplexity")
    print(f"Exported to {args.out}: AutoModelForCausalLM.from_pretrained({str(args.out)!r})")


if __name__ == "__main__":
    sys.exit(main())
