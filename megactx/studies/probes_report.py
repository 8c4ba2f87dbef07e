"""Answers to probes as numbers, tables and sentences."""

from megactx.evaluation.probes import READERS
from megactx.evaluation.sheets import Sheet

from .tables import interval
from .trained import NOTHING

ALL = "all"
FULL = READERS[-1]
HEADING = "in place of the blocks"
Z = 1.96  # 95 %
LEGEND = (
    "accuracy: share of probes of which every token of the answer is the argmax; brackets: 95 %, Wilson's interval of a"
    f" share. nats: NLL per token of the answer. {NOTHING}: what is guessed without the old blocks."
)


def summarise(answers: dict[str, list[dict]], about: dict) -> dict:
    """Rows of ``measure_probes`` by carrier -> plain numbers.

    Returns:
        ``about``, and ``classes`` (class -> probes), ``full`` (class -> figures of the full context), ``carriers``
        (carrier -> reader -> class -> figures). Figures: ``right``, ``of``, ``point``, ``low``, ``high`` of the
        accuracy, ``nll``; the class ``all`` is all of them.
    """
    first = next(iter(answers.values()))
    kinds = [*dict.fromkeys(row["kind"] for row in first), ALL]

    def by_class(rows, reader):
        return {kind: _figures([row[reader] for row in rows if kind in (ALL, row["kind"])]) for kind in kinds}

    return about | {
        "classes": {kind: sum(kind in (ALL, row["kind"]) for row in first) for kind in kinds},
        "full": by_class(first, FULL),
        "carriers": {
            name: {reader: by_class(rows, reader) for reader in READERS[:-1]} for name, rows in answers.items()
        },
    }


def _figures(answers: list[dict]) -> dict:
    right, of = sum(answer["right"] for answer in answers), len(answers)
    low, high = wilson(right, of)
    nll = sum(answer["nll"] for answer in answers) / of
    return {"right": right, "of": of, "point": right / of, "low": low, "high": high, "nll": nll}


def wilson(right: int, of: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927), which is no point where none or all are right."""
    share, z = right / of, Z**2 / of
    middle = (share + z / 2) / (1 + z)
    half = (z * share * (1 - share) + z**2 / 4) ** 0.5 / (1 + z)
    return max(0.0, middle - half), min(1.0, middle + half)


def sheets(numbers: dict) -> list[Sheet]:
    """Accuracy over gists only, accuracy with the block expanded, nats."""
    what = (
        f"{numbers['run']}: {numbers['classes'][ALL]} documents, {numbers['blocks']} old blocks of"
        f" {numbers['block_size']} tokens, {numbers['recency']} raw tokens"
    )
    words = {READERS[0]: "gists only", READERS[1]: "the block that told it expanded, gists in place of the others"}
    out = [
        _sheet(numbers, f"accuracy, {words[reader]}; {what}" if not index else f"accuracy, {words[reader]}", reader)
        for index, reader in enumerate(words)
    ]
    out += [_sheet(numbers, f"nats per token of the answer, {words[reader]}", reader, nats=True) for reader in words]
    return out


def _sheet(numbers: dict, title: str, reader: str, nats: bool = False) -> Sheet:
    def cells(figures):
        return [f"{value['nll']:.3f}" if nats else interval(value) for value in figures.values()]

    order = sorted(numbers["carriers"], key=lambda name: -_rank(numbers["carriers"][name][reader][ALL]))
    rows = [[FULL, *cells(numbers["full"])]]
    rows += [[name, *cells(numbers["carriers"][name][reader])] for name in order]
    header = [HEADING, *[f"{kind} ({count})" for kind, count in numbers["classes"].items()]]
    return Sheet(title, header, rows, (1 + order.index(numbers["subject"]),))


def _rank(figures: dict) -> float:
    return figures["point"] - 1e-3 * figures["nll"]  # where all are equally wrong, by how wrong


def notes_on(numbers: dict) -> list[str]:
    """The legend, and every class of which the base LM knows nothing."""
    full, of = numbers["full"], numbers["classes"]
    blocked = [kind for kind in full if kind != ALL and not full[kind]["right"]]
    if not full[ALL]["right"]:
        return [
            LEGEND,
            f"The base is the blocker: even with the full context it answers none of {of[ALL]} probes, so accuracy says"
            " nothing about what stands for a block; the nats still do.",
        ]
    return [
        LEGEND,
        *[
            f"{kind}: the base is the blocker, even with the full context it answers none of {of[kind]}."
            for kind in blocked
        ],
    ]


def rows_of(numbers: dict) -> list[dict]:
    """One row per carrier, reader and class."""
    rows = []
    for kind, figures in numbers["full"].items():
        rows.append({"carrier": FULL, "reader": FULL, "class": kind} | figures)
    for carrier, readers in numbers["carriers"].items():
        for reader, classes in readers.items():
            rows += [{"carrier": carrier, "reader": reader, "class": kind} | value for kind, value in classes.items()]
    return rows
