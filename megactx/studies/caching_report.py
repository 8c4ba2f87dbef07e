"""Gist caching as tables, sentences and CSV rows."""

from megactx.evaluation.sheets import Sheet

from .tables import interval
from .transfer import OVERALL

FORMS = {
    "again": "the prompt is read again",
    "cache": "plain cache of the prompt",
    "vectors": "gists as vectors",
    "keys": "gists as keys and values",
}
LEGEND = (
    "compression: of what is behind the sink; between 1 and K the newest blocks stay raw. bytes: 16 bit, 4 for an id."
    " FLOPs are counted, masked columns too; ms: wall clock, median, the forms take turns. x smaller: than the plain"
    " cache; x fewer, x faster: than reading the prompt again; vs cache: ms of the plain cache / ms.",
    "recovery = 1 - sum dNLL / sum dNLL_drop. Brackets: 95 %, bootstrap over texts, paired where it is a difference.",
)


def sheets(numbers: dict) -> list[Sheet]:
    """What an answer costs, what gists cost once, what they keep of the answer, domains, drift: as far as measured."""
    parts = {"costs": _costs, "making": _making, "overlap": _overlap, "transfer": _transfer, "drift": _drift}
    return [table(numbers) for part, table in parts.items() if part in numbers]


def _costs(numbers: dict) -> Sheet:
    rows, reference = [], {row["form"]: row for row in numbers["costs"] if row["form"] in ("again", "cache")}
    for row in numbers["costs"]:
        rows.append(
            [
                FORMS[row["form"]],
                "-" if row["compression"] is None else f"{row['compression']:g}",
                f"{row['entries']:,}",
                f"{row['bytes']:,}",
                f"{reference['cache']['bytes'] / row['bytes']:.3g}",
                f"{row['flops'] / 1e6:,.0f}",
                f"{reference['again']['flops'] / row['flops']:.1f}",
                f"{row['seconds'] * 1e3:,.1f}",
                f"{reference['again']['seconds'] / row['seconds']:.1f}",
                f"{reference['cache']['seconds'] / row['seconds']:.2f}",
                f"{row['answer_flops'] / 1e6:,.0f}",
                f"{row['answer_seconds'] * 1e3:,.0f}",
            ]
        )
    header = ["", "compression", "entries", "bytes", "x smaller", "MFLOP", "x fewer", "ms", "x faster", "vs cache"]
    header += ["MFLOP, all", "ms, all"]
    title = (
        f"a prompt of {numbers['tokens']:,} tokens is used again: {numbers['input']} are read, up to the answer's first"
        f" token; all: up to the last of {numbers['answer']} ({numbers['device']}, {numbers['threads']} threads)"
    )
    return Sheet(title, header, rows)


def _making(numbers: dict) -> Sheet:
    rows = []
    for name, cost in numbers["making"].items():
        vector = cost["vector_bytes"]
        rows.append(
            [
                name,
                f"{cost['flops'] / 1e6:,.0f}",
                f"{cost['keys_flops'] / 1e6:,.0f}",
                "-" if vector is None else f"{vector / numbers['block_size']:.3g}",
                f"{cost['key_bytes'] / numbers['block_size']:.3g}",
            ]
        )
    header = ["", "MFLOP, smallest form", "MFLOP, keys and values", "bytes per token, vectors", "keys and values"]
    return Sheet("what gists of the whole prompt cost once", header, rows)


def _overlap(numbers: dict) -> Sheet:
    overlap = numbers["overlap"]
    compressions = list(next(iter(overlap["rouge"].values())))
    rows = [[name, *[interval(found[c]) for c in compressions]] for name, found in overlap["rouge"].items()]
    title = (
        f"ROUGE-L of greedy continuations with those of the full prompt: {overlap['documents']} prompts,"
        f" {numbers['answer']} tokens behind {numbers['input']} raw ones"
    )
    if overlap["without_words"]:
        title += f"; {overlap['without_words']} left out, of which the full continuation has no word"
    return Sheet(title, ["in place of the blocks", *[f"compression {c:g}" for c in compressions]], rows)


def _transfer(numbers: dict) -> Sheet:
    transfer = numbers["transfer"]
    domains = [key for key in next(iter(transfer["rows"].values())) if key not in ("trained", OVERALL)]
    rows = []
    for name, row in transfer["rows"].items():
        trained = ", ".join(f"{domain} {share:.0%}" for domain, share in row["trained"].items())
        rows.append([name, trained or "-", *[interval(row[domain]) for domain in (*domains, OVERALL)]])
    title = (
        f"recovery by domain, h >= {transfer['first']}: {transfer['blocks']:,} blocks of {transfer['documents']}"
        f" texts, H = {numbers['horizon']}, hash {transfer['hash']}"
    )
    header = ["in place of the block", "trained on", *domains, OVERALL]
    return Sheet(title, header, rows, tuple(range(len(numbers["runs"]))))


def _drift(numbers: dict) -> Sheet:
    rows = [
        [
            f"{row['carrier']}, {row['stored']}",
            row["change"],
            f"{row['nll']:.3f}",
            interval(row["fresh"]),
            interval(row["kept"]),
            interval(row["lost"], 3, "+"),
        ]
        for row in numbers["drift"]
    ]
    header = ["", "change of the base", "its NLL", "fresh", "stored", "lost"]
    return Sheet("stored gists after the base has changed: recovery, h >= 1", header, rows)


def notes_on(numbers: dict) -> list[str]:
    """The legend, and what the carriers here are not."""
    trained = numbers["runs"] or "gistnet" in numbers["making"]
    return [*LEGEND, *([] if trained else ["There is no trained gist here: only the costs are those of gists."])]


def rows_of(numbers: dict) -> list[dict]:
    """Everything as rows of one CSV; ``table`` says which it is."""
    rows = [{"table": "cost"} | row for row in numbers["costs"]]
    rows += [{"table": "making", "carrier": name} | cost for name, cost in numbers["making"].items()]
    for name, found in numbers.get("overlap", {"rouge": {}})["rouge"].items():
        rows += [{"table": "rouge", "carrier": name, "compression": c} | value for c, value in found.items()]
    for name, row in numbers.get("transfer", {"rows": {}})["rows"].items():
        for domain in [key for key in row if key != "trained"]:
            rows.append({"table": "domain", "carrier": name, "domain": domain} | row[domain])
    for row in numbers.get("drift", []):
        flat = {key: value for key, value in row.items() if not isinstance(value, dict)}
        for what in ("fresh", "kept", "lost"):
            flat |= {what if part == "point" else f"{what}_{part}": value for part, value in row[what].items()}
        rows.append({"table": "drift"} | flat)
    return rows
