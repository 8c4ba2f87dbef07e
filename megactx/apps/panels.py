"""A view in Weights & Biases: a section per subsystem, a panel per metric, generated from the table of metrics.

    python -m megactx.apps.panels ENTITY/PROJECT          saves it as a view of that project, with your key
    python -m megactx.apps.panels ENTITY/PROJECT --json FILE      writes what would be saved, and asks nobody

What a session says of itself comes from ``megactx.runtime.metrics``, as ``callbacks=sessions`` logs it; what trainings
log beside it is named here.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import NamedTuple

from megactx.evaluation.page import REPORTS
from megactx.framework.command_line import run
from megactx.framework.extra import extra
from megactx.framework.files import write
from megactx.runtime.metrics import METRICS, SUBSYSTEMS, subsystem

DOMAIN = r"val/(?!lens/|gist/|lora/)\w+/"
FIGURES = "recovery|recovery_body|dnll|dnll_drop|kl|top1|substitutability|ppl_ratio"
TRAINING = {  # section -> (title, unit, names)
    "training": (
        ("Loss", "as the stage defines it", r"(train|val)/((gist|lens|lora)/)?(loss|loss_ema|margin|control)"),
        ("NLL", "nats per token", r"(train|val)/(lora/)?nll(_text|_drop)?"),
        ("NLL of a passage that comes back", "nats per token", r"(train|val)/nll_copied"),
        ("Base LM: what its own NLL lost", "nats per token", r"val/base_lost"),
        ("Base LM: windows with gists", "nats per token", r"(train|val)/(nll_gists|dnll_gists|dnll_dropped)"),
        ("Answers that are right", "share", r"val/accuracy"),
        ("Tokens", "tokens", r"train/(tokens|answer_tokens)"),
        ("Learning rate", "", r"lr/.*"),
        ("Norm of the gradient", "", r"grad_norm/.*"),
    ),
    "gists": (
        ("dNLL of a block's gist", "nats per token", r"(train|val)/(gist/)?(dnll|dnll_drop|dnll_ema)"),
        ("dNLL of controls that learn", "nats per token", r"train/(?!gist/)\w+/dnll"),
        ("Recovery", "share", r"val/recovery(_body)?"),
        ("Recovery by band of h", "share", r"val/recovery_h\w+"),
        ("KL", "nats per token", r"(train|val)/kl"),
        ("Substitutability and top-1", "share", r"val/(substitutability|top1)"),
        ("Perplexity ratio", "", r"val/ppl_ratio"),
        *((f"{name}, by domain", "", rf"{DOMAIN}{name}") for name in FIGURES.split("|")),
        ("Recovery by band of h, by domain", "share", rf"{DOMAIN}recovery_h\w+"),
        (
            "Losses by name",
            "nats",
            r"train/((block|contrastive|history|recall|level2|reconstruction)(/\w+)?|questions/loss)|val/questions/nll",
        ),
        ("Answers behind gists that are right", "share", r"(train|val)/questions/(\w+/)?right"),
        ("Gist space", "", r"val/(adjacent_distance|contrastive_gap|cosine_std|diversity)"),
        ("Gist space, by domain", "", rf"{DOMAIN}(adjacent_distance|contrastive_gap|cosine_std|diversity)"),
        ("Entropy of the pooling's attention", "bits", rf"(val/|{DOMAIN})attention_entropy"),
        ("Blocks of a validation", "blocks", rf"(val/|{DOMAIN})blocks"),
    ),
    "LensNet": (
        ("Rank correlation with measured values", "", r"val/rank_correlation"),
        ("Huber loss", "", r"(train|val)/(lens/)?huber"),
        ("Choice, budget and legality", "", r"train/(lens/)?(choice|kinds|best|gained|illegal|net_mass|lens|lod1)"),
    ),
    "window": (
        ("Cost of whole windows", "nats per token", r"(train|val)/cost|train/window"),
        ("NLL of a session", "nats per token", r"session/nll"),
    ),
    "prediction": (("Mean reciprocal rank of the next gist", "", r"val/mrr(_map)?"),),
    "attention": (("Keys and values that were kept", "share", r"session/kv\.reuse"),),
    "time": (
        ("Model FLOPs utilisation", "share of a card's peak", r"speed/mfu"),
        ("Throughput", "per second", r"speed/\w+_per_second"),
        ("Time of a step", "s", r"speed/step_seconds"),
        ("FLOPs so far", "", r"train/flops"),
    ),
}
TIMES = "trainer/global_step"  # Lightning's name of the optimizer step
COUNTED = ("megactx.tokens", "megactx.refocuses", "megactx.history.size")  # alike at each validation: not logged
COUNTED += ("megactx.kv.entries",)  # logged as a share


class Panel(NamedTuple):
    """One panel: curves of all metrics whose whole name the pattern matches."""

    title: str
    unit: str
    pattern: str


def sections() -> dict[str, list[Panel]]:
    """Subsystem -> its panels."""
    found = {name: [Panel(*panel) for panel in TRAINING.get(name, ())] for name in (*TRAINING, *SUBSYSTEMS)}
    for name, metric in METRICS.items():
        if name not in COUNTED:
            own = re.escape(f"session/{name.removeprefix('megactx.')}") + (r"\..*" if metric.attribute else "")
            unit = re.sub(r"^1$|[{}]", "", metric.unit)
            found[subsystem(name)].append(Panel(metric.meaning, unit, own))
    return found


def workspace(entity: str, project: str):
    """The view, as ``wandb_workspaces`` has it.

    Raises:
        ValueError: that package is not installed.
    """
    with extra("panels", "panels"):
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws

    tables = [wr.WeavePanelSummaryTable(table_name=f"report/{stem}") for stem in REPORTS]
    parts = [ws.Section(name="Reports", panels=tables, is_open=True)]
    for name, panels in sections().items():
        plots = [
            wr.LinePlot(title=panel.title, x=TIMES, title_y=panel.unit or None, metric_regex=f"^({panel.pattern})$")
            for panel in panels
        ]
        parts.append(ws.Section(name=name[0].upper() + name[1:], panels=plots, is_open=name in ("training", "gists")))
    return ws.Workspace(entity=entity, project=project, name="megactx", sections=parts, auto_generate_panels=False)


def _command(args: argparse.Namespace) -> None:
    entity, _, project = args.project.partition("/")
    if not (entity and project) or "/" in project:
        raise ValueError(f"PROJECT={args.project} is not allowed: ENTITY/PROJECT")
    view = workspace(entity, project)
    if args.json:
        write(args.json, view._to_model().model_dump_json(by_alias=True, indent=1) + "\n")
        print(f"Written: {args.json}")
        return
    try:
        view.save()
    except Exception as error:  # no key, no network, no such project: each library below has its own
        raise ValueError(
            f"PROJECT={args.project}: it was not saved ({error}). `wandb login` sets a key; --json FILE needs none"
        ) from error
    print(f"Saved: {view.url}")


def main(arguments: list[str] | None = None) -> int:
    """The command line; -> exit code."""
    parser = argparse.ArgumentParser(prog="python -m megactx.apps.panels", description=__doc__.partition("\n")[0])
    parser.add_argument("project", metavar="PROJECT", help="ENTITY/PROJECT in Weights & Biases")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the view there instead of saving it")
    return run(_command, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
