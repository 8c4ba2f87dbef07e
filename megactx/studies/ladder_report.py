"""The ladder as numbers, tables and pictures."""

import csv
import json
import math
import statistics
from pathlib import Path

from megactx.evaluation.bootstrap import difference_intervals, mean_interval, recovery_intervals, reverse, verdict
from megactx.evaluation.files import without_nan
from megactx.evaluation.metrics import BODY
from megactx.evaluation.scores import MORE_RAW, BlockScores
from megactx.evaluation.sheets import Sheet, markdown_sheet, print_sheet
from megactx.framework.files import replacing

WITH_ROW = 1  # first offset that all carriers can be scored at
COMPARED = {"all": "all h", "recovery": "h >= 1", "body": "h >= 4", "history": "history"}  # key -> column
LEGEND = (
    "recovery = 1 - sum dNLL / sum dNLL_drop, over all h, h >= 1 and h >= 4 (keys and values have no output row, so"
    " nothing predicts the token at h = 0: all h is for vectors). history: all blocks behind the recency window"
    " compressed; gain: NLL of as many more raw tokens minus NLL of the carriers, in nats. bytes: 16 bit, per"
    " compressed token. Brackets: 95 %, paired bootstrap over documents; with several runs the mean of points and of"
    " ends, ± their standard deviation, and a verdict where every run gives it."
)


def rungs(parts: dict, about: dict, subject: str, block: int, base: str) -> dict:
    """Scores of one run -> plain numbers.

    Args:
        parts: ``span``, ``history``, ``oracle``, ``history oracle``: ``BlockScores``, or ``None`` where it was not
            measured.
        about: carrier -> ``bytes_per_token``, ``parameters``, ``first``.
        subject: the carrier that all others are compared with.
    """
    span, history = parts["span"], parts["history"]
    out = {"subject": subject, "base": base, "block_size": block, "horizon": span.horizon}
    out |= {"blocks": len(span), "documents": span.document.unique().numel(), "block_hash": span.block_hash()}
    names = list(span.carriers)
    out["carriers"] = {name: about.get(name, {"bytes_per_token": None, "parameters": 0, "first": 0}) for name in names}
    with_row = [name for name in names if out["carriers"][name]["first"] == 0]
    for key, first, known in (("all", 0, with_row), ("recovery", WITH_ROW, names), ("body", BODY, names)):
        _put(out, key, recovery_intervals(span, known, first))
        if subject in known:
            rest = [name for name in known if name != subject]
            _put(out, f"{key}_below_subject", difference_intervals(span, subject, rest, first))
    _put(out, "h0", recovery_intervals(_columns(span, slice(0, 1)), with_row))
    out["by_offset"] = {name: (values - span.full).mean(0).tolist() for name, values in span.carriers.items()}
    out["by_offset"]["dropped"] = (span.drop - span.full).mean(0).tolist()
    out["domains"] = {}
    for domain in span.domains:
        found = recovery_intervals(span, names, WITH_ROW, domain)
        out["domains"][domain] = {name: interval._asdict() for name, interval in found.items()}
    if history is not None:
        out["segments"], out["history_hash"] = len(history), history.block_hash()
        out["cost_of_no_history"] = (history.drop.double() - history.full.double()).mean().item()
        names = [name for name in history.carriers if name != MORE_RAW]
        _put(out, "history", recovery_intervals(history, names))
        rest = [name for name in names if name != subject]
        _put(out, "history_below_subject", difference_intervals(history, subject, rest))
        gains = {name: (history.carriers[MORE_RAW] - history.carriers[name]).double().mean(1) for name in names}
        _put(out, "gain", {name: mean_interval(history.document, gain) for name, gain in gains.items()})
        out["more_raw"] = recovery_intervals(history, [MORE_RAW])[MORE_RAW]._asdict()
    for part, keys in (("oracle", {"recovery": WITH_ROW, "body": BODY}), ("history oracle", {"recovery": 0})):
        if (scores := parts[part]) is not None:
            names = [name for name in scores.carriers if name != MORE_RAW]
            out[part] = {"blocks": len(scores), "documents": scores.document.unique().numel()}
            for key, first in keys.items():
                found = recovery_intervals(scores, names, first)
                out[part][key] = {name: interval._asdict() for name, interval in found.items()}
    return without_nan(out)


def _put(out: dict, key: str, intervals: dict) -> None:
    for name, interval in intervals.items():
        out["carriers"][name][key] = interval._asdict()


def _columns(scores: BlockScores, columns: slice) -> BlockScores:
    carriers = {name: values[:, columns] for name, values in scores.carriers.items()}
    about = {"domain": scores.domain, "document": scores.document, "start": scores.start}
    return BlockScores(full=scores.full[:, columns], drop=scores.drop[:, columns], carriers=carriers, **about)


def combine(runs: list[dict]) -> dict:
    """Runs that differ in their seed -> one, with mean and standard deviation of every recovery.

    Raises:
        ValueError: they were measured on other blocks, or of another base.
    """
    for name in ("base", "block_hash", "block_size", "history_hash"):
        values = {run.get(name) for run in runs}
        if len(values) > 1:
            raise ValueError(f"ladder: the runs differ in {name}: {', '.join(map(str, values))}")
    out = json.loads(json.dumps(runs[0]))
    out["seeds"] = len(runs)
    for name, carrier in out["carriers"].items():
        for key in ("all", "recovery", "body", "h0", "history", "gain"):
            found = [run["carriers"].get(name, {}).get(key) for run in runs]
            points = [value["point"] for value in found if value and value["point"] is not None]
            if len(points) == len(runs) > 1 and carrier["parameters"]:  # what learns nothing is the same in each
                ends = {
                    end: statistics.mean(value[end] for value in found)
                    for end in ("low", "high")
                    if all(value[end] is not None for value in found)
                }
                carrier[key] |= {"point": statistics.mean(points), "std": statistics.stdev(points)} | ends
        for key in (f"{part}_below_subject" for part in COMPARED):
            found = [run["carriers"][name][key] for run in runs if key in run["carriers"].get(name, {})]
            if len(found) > 1 and all(value["low"] is not None for value in found):
                # A verdict needs every seed: the widest interval that holds all of theirs.
                carrier[key] |= {"low": min(v["low"] for v in found), "high": max(v["high"] for v in found)}
    return out


def show(numbers: dict) -> None:
    """Print the tables."""
    for sheet in sheets(numbers):
        print_sheet(sheet, width=190)
    print(LEGEND)


def write(folder: Path, runs: list[dict]) -> None:
    """Write ``ladder.md``, ``ladder.csv``, ``ladder.json`` and ``ladder.png``."""
    from .ladder_plot import plot

    numbers = combine(runs)
    with replacing(folder / "ladder.md") as part:
        part.write_text("\n".join(["# The ladder", "", *map(markdown_sheet, sheets(numbers)), LEGEND, ""]))
    with replacing(folder / "ladder.json") as part:
        part.write_text(json.dumps({"runs": runs}, indent=1, allow_nan=False))
    with replacing(folder / "ladder.csv") as part, part.open("w", newline="") as file:
        rows = [{"carrier": name} | _flat(numbers["carriers"][name]) for name in _order(numbers)]
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    plot(folder / "ladder.png", numbers)


def sheets(numbers: dict) -> list[Sheet]:
    """The ladder, best first; where there is an oracle, its own blocks."""
    order, rows = _order(numbers), []
    for name in order:
        carrier = numbers["carriers"][name]
        bytes_ = carrier["bytes_per_token"]
        rows.append(
            [
                name,
                "-" if bytes_ is None else f"{bytes_:.3g}",
                *[_cell(carrier.get(key)) for key in COMPARED],
                _cell(carrier.get("gain"), 3),
                *[_verdict(carrier, key) for key in COMPARED],
            ]
        )
    header = ["in place of the block", "bytes", *COMPARED.values(), "gain, nats"]
    header += [f"vs {column}" for column in COMPARED.values()]
    title = (
        f"the ladder: {numbers['blocks']:,} blocks of {numbers['block_size']} tokens, {numbers['documents']:,}"
        f" documents, H = {numbers['horizon']}, hash {numbers['block_hash']}"
    )
    if "segments" in numbers:
        title += (
            f"; {numbers['segments']:,} histories, hash {numbers['history_hash']}, having none costs"
            f" {numbers['cost_of_no_history']:.3f} nat, as many more raw tokens recover {_cell(numbers['more_raw'])}"
        )
    out = [Sheet(title, header, rows, (order.index(numbers["subject"]),))]
    for part, what in (("oracle", "a vector fitted to every block"), ("history oracle", "all vectors fitted together")):
        if oracle := numbers.get(part):
            names = sorted(oracle["recovery"], key=lambda name: -_point(oracle["recovery"][name]))
            keys = [key for key in ("recovery", "body") if key in oracle]
            rows = [[name, *[_cell(oracle[key][name]) for key in keys]] for name in names]
            header = ["in place of the block", "h >= 1", "h >= 4"] if len(keys) > 1 else ["in the history", "recovery"]
            counted = f"{oracle['blocks']:,} {'blocks' if len(keys) > 1 else 'histories'}"
            title = f"{what}: {counted} of {oracle['documents']:,} documents"
            out.append(Sheet(title, header, rows, (names.index(numbers["subject"]),)))
    return out


def _order(numbers: dict) -> list[str]:
    return sorted(numbers["carriers"], key=lambda name: -_point(numbers["carriers"][name].get("recovery")))


def _verdict(carrier: dict, key: str) -> str:
    difference = carrier.get(f"{key}_below_subject")
    return "" if not difference or difference["low"] is None else verdict(reverse(difference))


def _point(value: dict | None) -> float:
    return -math.inf if not value or value["point"] is None else value["point"]


def _cell(value: dict | None, digits: int = 2) -> str:
    if not value:
        return "-"
    if value["point"] is None:
        return "undefined"
    text = f"{value['point']:.{digits}f}"
    if value["low"] is not None:
        text += f" [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"
    return text + (f" ± {value['std']:.{digits + 1}f}" if "std" in value else "")


def _flat(carrier: dict) -> dict:
    out = {}
    for key, value in carrier.items():
        if isinstance(value, dict):
            out |= {f"{key}_{part}" if part != "point" else key: number for part, number in value.items()}
        else:
            out[key] = value
    return out
