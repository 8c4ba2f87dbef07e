"""The ladder as numbers, as one long table with its sheets, and as a picture."""

import json
import statistics
from functools import partial
from pathlib import Path

from megactx.evaluation import pictures
from megactx.evaluation.bootstrap import difference_intervals, mean_interval, recovery_intervals, told
from megactx.evaluation.metrics import BODY
from megactx.evaluation.scores import MORE_RAW
from megactx.evaluation.table import BLOCK, OVERALL, Report, Sheet, Table, cell, defined, pivot, without_nan

WITH_ROW = 1  # first offset that all carriers can be scored at
COMPARED = {"all": "all h", "recovery": "h >= 1", "body": "h >= 4", "history": "history"}  # key -> span of the table
ORACLES = {"oracle": "a vector fitted to every block", "history oracle": "all vectors fitted together"}
LINES = 7  # carriers with a line of their own in the middle panel
WIDTH = 190  # columns, where the output is no terminal
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
    out |= {"blocks": len(span), "documents": span.documents, "block_hash": span.block_hash()}
    names = list(span.carriers)
    out["carriers"] = {name: about.get(name, {"bytes_per_token": None, "parameters": 0, "first": 0}) for name in names}
    with_row = [name for name in names if out["carriers"][name]["first"] == 0]
    for key, first, known in (("all", 0, with_row), ("recovery", WITH_ROW, names), ("body", BODY, names)):
        _put(out, key, recovery_intervals(span, known, first))
        if subject in known:
            rest = [name for name in known if name != subject]
            _put(out, f"{key}_below_subject", difference_intervals(span, subject, rest, first))
    _put(out, "h0", recovery_intervals(span.take(slice(None), slice(0, 1)), with_row))
    out["by_offset"] = {name: (values - span.full).mean(0).tolist() for name, values in span.carriers.items()}
    out["by_offset"]["dropped"] = (span.drop - span.full).mean(0).tolist()
    out["domains"] = {
        domain: {name: interval._asdict() for name, interval in recovery_intervals(own, names, WITH_ROW).items()}
        for domain, own in span.by_domain().items()
        if domain != OVERALL
    }
    if history is not None:
        out["segments"], out["history_hash"] = len(history), history.block_hash()
        out["cost_of_no_history"] = history.cost()
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
            out[part] = {"blocks": len(scores), "documents": scores.documents}
            for key, first in keys.items():
                found = recovery_intervals(scores, names, first)
                out[part][key] = {name: interval._asdict() for name, interval in found.items()}
    return without_nan(out)


def _put(out: dict, key: str, intervals: dict) -> None:
    for name, interval in intervals.items():
        out["carriers"][name][key] = interval._asdict()


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


def table_of(numbers: dict) -> Table:
    """The numbers of ``rungs`` or ``combine`` as one long table; ``behind``: how far the subject is above a carrier."""
    table, n = Table(), numbers["documents"]
    for carrier, found in numbers["carriers"].items():
        table.add_all({k: found[k] for k in ("bytes_per_token", "parameters")}, "metric", carrier=carrier)
        for key, span in (COMPARED | {"h0": "h = 0"}).items():
            for metric, value in (("recovery", found.get(key)), ("behind", found.get(f"{key}_below_subject"))):
                if value:
                    table.add(metric, value, carrier=carrier, span=span, n=n)
        if "gain" in found:
            table.add("gain", found["gain"], carrier=carrier, span="history", n=n)
    about = {"metric": "recovery", "span": COMPARED["recovery"], "n": n}
    table.add_all(numbers.get("domains", {}), "domain", "carrier", **about)
    for part in ORACLES:
        found = {f"{part}, {COMPARED[k]}": values for k, values in numbers.get(part, {}).items() if k in COMPARED}
        table.add_all(found, "span", "carrier", metric="recovery", n=numbers.get(part, {}).get("documents"))
    return table


def report_of(runs: list[dict]) -> Report:
    """Numbers of one or several runs -> the report: the ladder, best first, and the blocks of the oracles."""
    numbers = combine(runs)
    table, subject = table_of(numbers), numbers["subject"]
    own, spans = Table(row for row in table if "domain" not in row), list(COMPARED.values())
    columns = [("bytes", "bytes_per_token", lambda row: "-" if row["point"] is None else f"{row['point']:.3g}")]
    columns += [(span, {"metric": "recovery", "span": span}) for span in spans] + [("gain, nats", "gain", ".3f")]
    columns += [(f"vs {span}", {"metric": "behind", "span": span}, told) for span in spans]
    title = (
        f"the ladder: {numbers['blocks']:,} blocks of {numbers['block_size']} tokens, {numbers['documents']:,}"
        f" documents, H = {numbers['horizon']}, hash {numbers['block_hash']}"
    )
    if "segments" in numbers:
        title += (
            f"; {numbers['segments']:,} histories, hash {numbers['history_hash']}, having none costs"
            f" {numbers['cost_of_no_history']:.3f} nat, as many more raw tokens recover {cell(numbers['more_raw'])}"
        )
    order = _ranked(table)
    sheets = [pivot(title, own, columns, heading=BLOCK, order=order, strong=[subject])]
    sheets += [_oracle_sheet(table, part, numbers[part], subject) for part in ORACLES if numbers.get(part)]
    return Report("The ladder", table, sheets, LEGEND, draw=partial(plot, numbers, table), width=WIDTH)


def _ranked(table: Table) -> list[str]:
    known = table.pick(metric="recovery", span=COMPARED["recovery"], domain=None)
    rest = [name for name in table.names("carrier") if name not in known.names("carrier")]
    return known.ranked() + [name for name in rest if table.one(carrier=name, metric="parameters")]


def _oracle_sheet(table: Table, part: str, oracle: dict, subject: str) -> Sheet:
    spans = [COMPARED[key] for key in ("recovery", "body") if key in oracle]
    own = table.pick(span=f"{part}, {spans[0]}")
    found = Table(row for row in table if row.get("span", "").startswith(f"{part}, "))
    columns = [(span, {"span": f"{part}, {span}"}) for span in spans]
    what, heading = ("blocks", BLOCK) if part == "oracle" else ("histories", "in the history")
    title = f"{ORACLES[part]}: {oracle['blocks']:,} {what} of {oracle['documents']:,} documents"
    return pivot(title, found, columns, heading=heading, order=own.ranked(), strong=[subject])


def plot(numbers: dict, table: Table, path: Path) -> None:
    """Recovery against bytes, dNLL by offset, recovery by domain; 1800 x 640 pixels."""
    recovery, subject = table.pick(metric="recovery", span=COMPARED["recovery"]), numbers["subject"]
    names = [name for name in _ranked(table) if defined(recovery.one(carrier=name, domain=None))]
    colours = pictures.colours_of(names, subject)
    shown = list(dict.fromkeys([subject, *names[:LINES]]))
    with pictures.picture(path, (18, 6.4), columns=3, width_ratios=(1.1, 1, 1)) as grid:
        left, middle, right = grid[0]
        _bytes(left, recovery, {name: numbers["carriers"][name]["bytes_per_token"] for name in names}, colours)
        middle.plot(numbers["by_offset"]["dropped"], color="black", linestyle="--", label="dropped")
        for name in shown:
            first, values = numbers["carriers"][name]["first"], numbers["by_offset"][name]
            middle.plot(range(first, len(values)), values[first:], color=colours[name], label=name)
        middle.set_yscale("symlog", linthresh=0.1)
        pictures.panel(middle, "dNLL by offset", "tokens behind the block (h)", "dNLL, nats per token (symlog)")
        width, domains = 0.8 / len(shown), list(numbers["domains"])
        for index, name in enumerate(shown):
            rows = [recovery.one(carrier=name, domain=domain) for domain in domains]
            places = [place + (index - (len(shown) - 1) / 2) * width for place in range(len(domains))]
            known = [(x, row) for x, row in zip(places, rows, strict=True) if defined(row)]
            right.bar([x for x, _ in known], [row["point"] for _, row in known], width, color=colours[name], label=name)
            pictures.line(right, known, color="black", linestyle="", marker=None, capsize=2)
        right.set_xticks(range(len(domains)), domains)
        pictures.panel(right, "By domain", "", "recovery, h >= 1")
        for axes in (middle, right):
            pictures.legend(axes)


def _bytes(axes, recovery: Table, sizes: dict[str, float], colours: dict) -> None:
    known = [name for name, size in sizes.items() if size]
    for name, x in zip(known, pictures.side_by_side([sizes[name] for name in known]), strict=True):
        pictures.named(axes, x, recovery.one(carrier=name, domain=None), name, color=colours[name])
    pictures.powers(axes, [sizes[name] for name in known])
    pictures.panel(
        axes,
        "What a block is worth behind each carrier",
        "bytes per token that is compressed, 16 bit (log scale)",
        "recovery, h >= 1",
        zero=True,
    )
    pictures.room_above(axes)
