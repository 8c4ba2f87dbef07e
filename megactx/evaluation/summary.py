"""The numbers of an end-of-run report: every carrier beside its controls, intervals, verdicts, targets (method 4, 5).

A claim that a gist is better than a control holds only over all h **and** over h >= 4, so both are always there. A
target is printed with the dropped block's own value; one that dropping meets too says nothing about gists, and does not
count.
"""

import torch

from .bootstrap import difference_intervals, mean_interval, recovery_intervals, verdict
from .measure import MEAN_BELOW
from .metrics import BODY, LOWER_IS_BETTER, WEAK, block_sums, figures
from .scores import DROP, MORE_RAW, BlockScores
from .table import OVERALL

WEIGHTED = "weighted"  # in front of a target: over the domains by their share of the training documents
FULL, DROPPED = "full", "dropped"  # rows of the report that are no carriers
SPANS = {"all": 0, "body": BODY}  # first offset of each
# Tried raw and rescaled to the token RMS, and quoted with whichever does better: a control gets its best form.
BEST_OF = "untrained mean"
FAMILIES = (BEST_OF, MEAN_BELOW)
CLAIMED_FROM = 20  # documents: an interval over fewer says little
ENOUGH_BLOCKS, ENOUGH_DOCUMENTS = 2000, 50
GEOMETRY_TARGETS = {"diversity": 0.5, "contrastive_gap": 0.1, "attention_entropy": (2.0, 4.0)}
SPACE = ("diversity", "cosine_std", "adjacent_distance", "contrastive_gap", "attention_entropy")
LEVEL2_TARGET = 2.0  # nats: dNLL of a gist of gists


def summarise(
    scores: BlockScores,
    subject: str = "gistnet",
    targets: dict[str, float] | None = None,
    geometry: dict[str, float] | None = None,
    copies: dict[int, BlockScores] | None = None,
    level2: BlockScores | None = None,
    history: BlockScores | None = None,
    weights: dict[str, float] | None = None,
) -> dict:
    """Scores -> plain nested dicts of floats and strings; NaN stands for undefined.

    Args:
        subject: the carrier that the report is about; all others are its controls.
        targets: metric -> value to reach, with ``domain/`` in front where it is for one domain, such as
            ``{"dnll": 0.5, "code/substitutability": 0.7, "adjacent_distance": 0.3}``.
        geometry: name and ``domain/name`` -> value: what ``SpaceMetrics`` computed, and ``reconstruction`` if asked.
        copies: what ``measure_copies`` gave: distance -> scores of second occurrences.
        weights: domain -> share of the training documents, for targets of ``weighted/`` figures: the mean of the
            domains' own figures by these shares, domains without a share left out.
        level2: what ``measure_level`` gave: scores behind spans that gists of gists replace.
        history: what ``measure_history`` gave: scores of segments behind compressed histories.

    Raises:
        ValueError: no such subject, or a target for something that is not measured.
    """
    if subject not in scores.carriers:
        raise ValueError(f"report: {subject!r} was not scored, only {list(scores.carriers)}")
    geometry = {name: float(value) for name, value in (geometry or {}).items()}
    groups = {name: _group(own, subject) for name, own in scores.by_domain().items()}
    numbers = {
        "subject": subject,
        "horizon": scores.horizon,
        "blocks": len(scores),
        "documents": scores.documents,
        "block_hash": scores.block_hash(),
        "groups": groups,
        "geometry": geometry,
        "copies": {str(at): {"blocks": len(part)} | _passages(part) for at, part in (copies or {}).items()},
        "level2": level2 and _group(level2, subject),
        "history": history and _history(history),
    }
    goals = {name: goal for name, goal in GEOMETRY_TARGETS.items() if name in geometry}
    goals |= {name: float(goal) for name, goal in (targets or {}).items()}
    numbers["targets"] = [_target(numbers, name, goal, weights or {}) for name, goal in goals.items()]
    if level2:
        rows = numbers["level2"]["rows"]
        reached = {"value": rows[subject]["dnll"], DROPPED: rows[DROPPED]["dnll"]}
        numbers["targets"].append(_judged({"target": "level2/dnll", "goal": LEVEL2_TARGET, "below": True} | reached))
    numbers["notes"] = _notes(numbers)
    return numbers


def check_targets(targets: dict[str, float], horizon: int) -> None:
    """Refuse targets for what is not measured, before a run and not after it.

    Raises:
        ValueError: names the target and what is measured.
    """
    empty = torch.zeros(1, horizon)
    known = sorted({*figures(block_sums(empty, empty, empty, empty, empty)), *SPACE})
    for name in targets:
        if name.rpartition("/")[2] not in known:
            raise ValueError(f"stage.targets.{name}: it is not measured; measured are {', '.join(known)}")


def _group(scores: BlockScores, subject: str) -> dict:
    full, drop, figure = scores.full, scores.drop, {}
    for name, values in ({FULL: full, DROPPED: drop} | scores.carriers).items():
        key = DROP if name == DROPPED else name
        kl, agree = scores.kl.get(key), scores.agree.get(key)
        if name == FULL:
            kl, agree = torch.zeros_like(full), torch.ones_like(full, dtype=torch.bool)
        found = figures(block_sums(full, drop, values, kl, agree))
        figure[name] = {key: value.item() for key, value in found.items() if key not in ("blocks", "dnll_drop")}
    drop_cost = drop.double() - full.double()
    out = {
        "blocks": len(scores),
        "documents": scores.documents,
        "rows": figure,
        "cost_of_dropping": {"all": drop_cost.mean().item(), "h4_15": drop_cost[:, BODY:16].mean().item()},
        "recovery": {},
        "against": {},
    }
    controls = [name for name in scores.carriers if name != subject]
    for span, first in SPANS.items():
        for name, interval in recovery_intervals(scores, list(scores.carriers), first).items():
            out["recovery"].setdefault(name, {})[span] = interval._asdict()
        for name, interval in difference_intervals(scores, subject, controls, first).items():
            told = verdict(interval) if out["documents"] >= CLAIMED_FROM else "too few documents"
            out["against"].setdefault(name, {})[span] = interval._asdict() | {"verdict": told}
    out["unquoted"] = []
    for best_of in FAMILIES:
        family = [name for name in controls if name.startswith(best_of)]
        if len(family) < 2:
            continue
        quoted = min(family, key=lambda name: figure[name]["dnll"])
        out["rows"][best_of] = figure[quoted] | {"quoted": quoted}
        # The claim is tested against the form that is better over that span: the smaller difference.
        out["against"][best_of] = {
            span: min((out["against"][name][span] for name in family), key=_point) for span in SPANS
        }
        out["unquoted"] += family
    return out


def _point(difference: dict) -> float:
    return float("inf") if difference["point"] != difference["point"] else difference["point"]


def _passages(scores: BlockScores) -> dict:
    """What having nothing costs, in nats per token, and recovery of each carrier, overall and by domain."""
    out = {"cost": {}, "recovery": {}}
    for name, own in scores.by_domain().items():
        out["cost"][name] = own.cost()
        intervals = recovery_intervals(own, list(own.carriers))
        out["recovery"][name] = {carrier: interval._asdict() for carrier, interval in intervals.items()}
    return out


def _history(scores: BlockScores) -> dict:
    """The passages behind compressed histories, and each carrier's gain at equal budget."""
    out = {"segments": len(scores), "tokens": scores.horizon, "documents": scores.documents}
    out |= {"block_hash": scores.block_hash(), "gain": {}} | _passages(scores)
    for carrier, values in scores.carriers.items():
        if carrier != MORE_RAW:
            gain = (scores.carriers[MORE_RAW].double() - values.double()).mean(dim=1)
            out["gain"][carrier] = mean_interval(scores.document, gain)._asdict()
    return out


def _target(numbers: dict, name: str, goal: float | tuple[float, float], weights: dict[str, float]) -> dict:
    """A target with the value reached, the dropped block's own value, and what came of it."""
    group, _, metric = name.rpartition("/")
    group = group or OVERALL
    out = {"target": name, "goal": goal, "below": metric in LOWER_IS_BETTER, "value": None, DROPPED: None}
    if name in numbers["geometry"]:
        out["value"] = numbers["geometry"][name]
    elif group == WEIGHTED:
        for row, key in ((numbers["subject"], "value"), (DROPPED, DROPPED)):
            out[key] = _weighted(numbers["groups"], row, metric, weights)
    elif group not in numbers["groups"]:
        return out | {"status": "no blocks"}
    else:
        rows = numbers["groups"][group]["rows"]
        if metric not in rows[numbers["subject"]]:
            known = sorted({*rows[numbers["subject"]], *(key for key in numbers["geometry"] if "/" not in key)})
            raise ValueError(f"targets.{name}: not measured; measured are {', '.join(known)}")
        out["value"], out[DROPPED] = rows[numbers["subject"]][metric], rows[DROPPED].get(metric)
    return _judged(out)


def _weighted(groups: dict, row: str, metric: str, weights: dict[str, float]) -> float:
    shares = {name: share for name, share in weights.items() if share and name in groups}
    if not shares:
        return float("nan")
    total = sum(share * groups[name]["rows"][row][metric] for name, share in shares.items())
    return total / sum(shares.values())


def _judged(target: dict) -> dict:
    goal = target["goal"]

    def met(value):
        if value is None:
            return False
        if isinstance(goal, tuple):
            return goal[0] <= value <= goal[1]
        return value < goal if target["below"] else value > goal

    if target["value"] != target["value"]:
        return target | {"status": "undefined"}
    if met(target[DROPPED]):
        return target | {"status": "not informative"}
    return target | {"status": "passed" if met(target["value"]) else "missed"}


def _notes(numbers: dict) -> list[str]:
    """What a reader must know before believing the tables."""
    notes = []
    blocks, documents = numbers["blocks"], numbers["documents"]
    if blocks < ENOUGH_BLOCKS or documents < ENOUGH_DOCUMENTS:
        enough = f"a comparison counts with {ENOUGH_BLOCKS:,} of {ENOUGH_DOCUMENTS}, or with all there are."
        notes.append(f"{blocks:,} blocks of {documents} documents: {enough}")
    for name, group in numbers["groups"].items():
        cost = group["cost_of_dropping"]
        if cost["all"] < WEAK:
            notes.append(f"{name}: dropping costs {cost['all']:.3f} nat (< {WEAK}), so recovery is undefined.")
        if cost["h4_15"] < WEAK:
            lost = f"dropping costs {cost['h4_15']:.3f} nat over h = 4-15 (< {WEAK})"
            notes.append(f"{name}: base too weak: {lost}, so nothing can be said of h >= 4.")
        ratio = group["rows"][numbers["subject"]]["ppl_ratio"]
        if ratio > 2:
            notes.append(f"{name}: ALARM: perplexity ratio {ratio:.2f} is above 2.0.")
    for distance, copied in numbers["copies"].items():
        if (cost := copied["cost"][OVERALL]) < WEAK:
            lost = f"dropping the first occurrence costs {cost:.3f} nat (< {WEAK}): the base does not copy from there"
            notes.append(f"copies at a distance of {distance} tokens: {lost}, so copy recovery is undefined.")
    geometry = numbers["geometry"]
    if geometry.get("diversity", 1) < 0.3:
        notes.append(f"ALARM: gist diversity {geometry['diversity']:.2f} is below 0.3: the gists collapse.")
    if geometry.get("cosine_std", 1) < 0.1:
        std = geometry["cosine_std"]
        notes.append(f"std of pairwise cosine {std:.2f} is below 0.1: try contrastive.weight (lambda).")
    return notes
