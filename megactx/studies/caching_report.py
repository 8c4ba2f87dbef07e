"""The long table of gist caching as sheets: as much as was measured."""

from megactx.evaluation.table import BLOCK, BLOCKS, OVERALL, Report, Sheet, Table, pivot

FORMS = {
    "again": "the prompt is read again",
    "cache": "plain cache of the prompt",
    "vectors": "gists as vectors",
    "keys": "gists as keys and values",
}
LEGEND = (
    "compression: of what is behind the sink; between 1 and K the newest blocks stay raw. bytes: 16 bit, 4 for an id."
    " FLOPs are counted, masked columns too; ms: wall clock, median, the forms take turns. x smaller: than the plain"
    " cache; x fewer, x faster: than reading the prompt again; vs cache: ms of the plain cache / ms."
    " recovery = 1 - sum dNLL / sum dNLL_drop. Brackets: 95 %, bootstrap over texts, paired where it is a difference."
)


def report_of(table: Table, about: dict) -> Report:
    """What an answer costs, what gists cost once, what they keep of the answer, domains, drift."""
    parts = {"flops": _costs, "made_flops": _making, "rouge": _overlap, "recovery": _transfer, "lost": _drift}
    sheets = [part(table, about) for metric, part in parts.items() if table.one(metric=metric)]
    notes = [] if about["trained"] else ["There is no trained gist here: only the costs are those of gists."]
    return Report("Gist caching", Table(table), sheets, LEGEND, notes, about)


def _costs(table: Table, about: dict) -> Sheet:
    """A line per form and compression; of the two without gists, the ratios."""
    costs = {(row["carrier"], row["span"]): {} for row in table.pick(metric="flops")}
    for form, compression in costs:
        own = table.pick(carrier=form, span=compression)
        costs[form, compression] = {metric: own.point(metric=metric) for metric in own.names("metric")}
    again, cache = costs["again", None], costs["cache", None]
    rows = [
        [
            FORMS[form],
            "-" if compression is None else f"{compression:g}",
            f"{cost['entries']:,}",
            f"{cost['bytes']:,}",
            f"{cache['bytes'] / cost['bytes']:.3g}",
            f"{cost['flops'] / 1e6:,.0f}",
            f"{again['flops'] / cost['flops']:.1f}",
            f"{cost['seconds'] * 1e3:,.1f}",
            f"{again['seconds'] / cost['seconds']:.1f}",
            f"{cache['seconds'] / cost['seconds']:.2f}",
            f"{cost['answer_flops'] / 1e6:,.0f}",
            f"{cost['answer_seconds'] * 1e3:,.0f}",
        ]
        for (form, compression), cost in costs.items()
    ]
    header = ["", "compression", "entries", "bytes", "x smaller", "MFLOP", "x fewer", "ms", "x faster", "vs cache"]
    header += ["MFLOP, all", "ms, all"]
    title = (
        f"a prompt of {about['tokens']:,} tokens is used again: {about['input']} are read, up to the answer's first"
        f" token; all: up to the last of {about['answer']} ({about['device']}, {about['threads']} threads)"
    )
    return Sheet(title, header, rows)


def _making(table: Table, about: dict) -> Sheet:
    def millions(row: dict) -> str:
        return f"{row['point'] / 1e6:,.0f}"

    def per_token(row: dict | None) -> str:
        return "-" if row is None else f"{row['point'] / about['block_size']:.3g}"

    columns = [("MFLOP, smallest form", "made_flops", millions), ("MFLOP, keys and values", "keys_flops", millions)]
    columns += [("bytes per token, vectors", "vector_bytes", per_token), ("keys and values", "key_bytes", per_token)]
    order = table.pick(metric="made_flops").names("carrier")
    return pivot("what gists of the whole prompt cost once", table, columns, order=order)


def _overlap(table: Table, about: dict) -> Sheet:
    own = table.pick(metric="rouge")
    columns = [(f"compression {compression:g}", {"span": compression}) for compression in own.names("span")]
    title = (
        f"ROUGE-L of greedy continuations with those of the full prompt: {about['prompts']} prompts,"
        f" {about['answer']} tokens behind {about['input']} raw ones"
    )
    if about["without_words"]:
        title += f"; {about['without_words']} left out, of which the full continuation has no word"
    return pivot(title, own, columns, heading=BLOCKS)


def _transfer(table: Table, about: dict) -> Sheet:
    transfer, own = about["transfer"], table.pick(metric="recovery")

    def trained(row: dict) -> str:
        shares = transfer["trained"].get(row["carrier"], {})
        return ", ".join(f"{domain} {share:.0%}" for domain, share in shares.items()) or "-"

    columns = [("trained on", {"domain": OVERALL}, trained)]
    columns += [(domain, {"domain": domain}) for domain in own.names("domain")]
    title = (
        f"recovery by domain, h >= {transfer['first']}: {transfer['blocks']:,} blocks of {transfer['documents']}"
        f" texts, H = {about['horizon']}, hash {transfer['hash']}"
    )
    return pivot(title, own, columns, heading=BLOCK, strong=transfer["trained"])


def _drift(table: Table, about: dict) -> Sheet:
    """A line per carrier, form and change; the table has the change as the run."""

    def carrier(name: tuple[str, str]) -> list[str]:
        return [*reversed(name)]

    columns = [("its NLL", "nll", ".3f"), ("fresh", "fresh"), ("stored", "kept"), ("lost", "lost", "+.3f")]
    title, own = (
        "stored gists after the base has changed: recovery, h >= 1",
        Table(row for row in table if "run" in row),
    )
    return pivot(title, own, columns, ("run", "carrier"), ["", "change of the base"], label=carrier)
