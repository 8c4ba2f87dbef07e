"""Questions that need the past, by the rules of RULER: generated, seeded, of any length, with kvpress's columns.

Words are those of the reference of the standard library (``pydoc_data.topics``), which every installation has. Needles
are character spans of the context; tasks that need all of it (cwe, fwe) have none.
"""

import functools
import random
import re
import uuid
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator

from . import babilong, paraphrases
from .embedded import Embedded
from .facts import Fact, begun, in_place
from .files import NARRATIVE, Files

NOISE = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa1": 20}  # that an answer may have
DEPTHS = 40


@functools.cache
def words() -> tuple[str, ...]:
    """Lower-case words, sorted: wonderwords' nouns would stand here."""
    from pydoc_data.topics import topics

    found = re.findall(r"\b[a-z]{4,10}\b", " ".join(topics.values()))
    return tuple(sorted({*found}))


def _key(draw: random.Random) -> str:
    return "-".join(draw.sample(words(), 2))


def _number(draw: random.Random) -> str:
    return str(draw.randrange(10**6, 10**7))


def _uuid(draw: random.Random) -> str:
    return str(uuid.UUID(int=draw.getrandbits(128), version=4))


def _needles(draw: random.Random, count: int, key: Callable, value: Callable, kind: str):
    keys, values = {}, {}  # ordered, no value twice
    while len(keys) < count:
        keys[key(draw)] = None
    while len(values) < count:
        values[value(draw)] = None
    said = [f"One of the special magic {kind}s for {k} is: {v}." for k, v in zip(keys, values, strict=True)]
    return said, [*keys], [*values]


def _asked(key: str, kind: str) -> dict:
    return {
        "question": f"What is the special magic {kind} for {key} mentioned in the text above?\n",
        "answer_prefix": f"The special magic {kind} for {key} mentioned in the text above is",
    }


def hidden(draw: random.Random, filler, told: list[str]) -> tuple[list[str], list[int]]:
    """Needles between filler, in their order -> all sentences, places of the needles."""
    depths = sorted(draw.choice(range(DEPTHS + 1)) * len(filler) // DEPTHS for _ in told)
    units, places = list(filler), []
    for shift, (depth, needle) in enumerate(zip(depths, told, strict=True)):
        units.insert(depth + shift, Fact(needle))
        places.append(depth + shift)
    return units, places


def _noise(count: int) -> list[str]:
    return [NOISE[n % len(NOISE)] for n in range(count)]


def _single(draw, filler):
    (needle,), (key,), (value,) = _needles(draw, 1, _key, _number, "number")
    units, places = hidden(draw, filler, [needle])
    return units, places, [value], _asked(key, "number")


def niah_single_1(draw, count, essay):
    return _single(draw, _noise(count))


def niah_single_2(draw, count, essay):
    if count > len(essay):
        raise ValueError(f"--path: the prose has {len(essay)} sentences, too few for this length; give more")
    return _single(draw, essay[:count])


def _multikey(draw, count, task, stack=None):
    at, of = draw.randrange(10**9), STACKS[task]
    told, keys, values = stack or _needles(draw, max(1, count), *of)
    at %= len(told)
    return told, [at], [values[at]], _asked(keys[at], of[-1])


def niah_multikey_2(draw, count, essay):
    return _multikey(draw, count, "niah_multikey_2")


def niah_multikey_3(draw, count, essay):
    return _multikey(draw, count, "niah_multikey_3")


def vt(draw, count, essay):
    names = {}
    while len(names) < 5:
        names["".join(draw.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5))] = None
    names, value = [*names], str(draw.randrange(10**4, 10**5))
    chain = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a}" for a, b in zip(names, names[1:], strict=False))]
    units, places = hidden(draw, _noise(count), chain)
    question = f"Find all variables that are assigned the value {value} in the text above.\n"
    prefix = f"By the chain of assignments, 5 variables are assigned the value {value}, they are:"
    return units, places, names, {"question": question, "answer_prefix": prefix}


def cwe(draw, count, essay):
    chosen = draw.sample(words(), min(len(words()), 10 + count))
    units = chosen[:10] * 30 + chosen[10:] * 3
    draw.shuffle(units)
    units = [f"{n}. {word}" for n, word in enumerate(units, 1)]
    question = "What are the 10 most common words in the above list?\n"
    return units, [], chosen[:10], {"question": question, "answer_prefix": "The top 10 most common words are:"}


def fwe(draw, count, essay):
    names = {}
    while len(names) < 50:
        names["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=6))] = None
    names = [*names]
    # Zipf with exponent 2; the three most frequent stay apart however few words there are.
    units = [name for n, name in enumerate(names, 1) for _ in range(max(4 - n, int(count * 0.6 / n**2)))]
    draw.shuffle(units)
    question = "What are the three most frequently appeared words in the above coded text?\n"
    prefix = "The three most frequently appeared words are:"
    return units, [], names[:3], {"question": question, "answer_prefix": prefix}


GENERATORS = (niah_single_1, niah_single_2, niah_multikey_2, niah_multikey_3, vt, cwe, fwe, babilong.qa1)
GENERATORS += (paraphrases.niah_paraphrase, paraphrases.niah_changed)  # not of RULER
TASKS = {generator.__name__: generator for generator in GENERATORS}
PROSE = ("niah_single_2", "qa1", "niah_paraphrase", "niah_changed")  # stand between the sentences of a prose
WHOLE = ("cwe", "fwe")  # need all of the context
STACKS = {"niah_multikey_2": (_key, _number, "number"), "niah_multikey_3": (_uuid, _uuid, "uuid")}  # facts alone
LETTERS = 8  # of a token, at most, on average
OUTSIDE = 128  # tokens, at most, of question and prefix behind a history that cases share


@functools.cache
def sentences(path: str | None) -> list[str]:
    """Sentences of the texts of a path; ``None``: of the narrative ones that the package brings."""
    rows = (Files(path) if path else Embedded()).load()
    text = " ".join(row["text"] for row in rows if path or row["domain"] == NARRATIVE)
    return re.split(r"(?<=[.!?])\s+", text)


def case(task: str, length: int, tokenizer, seed: int, essay: list[str] = (), shared: bool = False) -> dict:
    """A row: as long as may be, with question, prefix and the tokens to write within ``length`` tokens.

    Args:
        shared: all seeds have one history: what a case tells takes the place of as many tokens of it, see ``facts``; of
            a task that has nothing else they ask for one or another of its facts.

    Raises:
        ValueError: an unknown task, a length that holds no case, too little prose, or a task whose cases share nothing.
    """
    if task not in TASKS:
        raise ValueError(f"--tasks={task} is not known, allowed are {', '.join(TASKS)}")
    if shared:
        return _sharing(task, length, tokenizer, seed, essay)
    room = TOKENS[task.split("_")[0]]

    def built(count: int) -> tuple[dict, int]:
        units, places, answers, asked = TASKS[task](random.Random(f"{task}/{length}/{seed}"), count, essay)
        row = _row(task, length, " ".join(units), _spans(units, places), answers, asked)
        text = f"{row['context']}\n{row['question']}{row['answer_prefix']}"
        return row, len(tokenizer(text, add_special_tokens=False)["input_ids"]) + room

    low, cap = 0, len(words()) - 10 if task == "cwe" else min(len(essay), length) if task in PROSE else length
    row, below = built(low)
    if below > length:
        raise ValueError(f"--lengths={length} is not allowed: too short for {task}, which takes {below} tokens")
    # Tokens grow evenly with the count, so a straight line leads close: a text of a million tokens is built few times.
    few = min(cap, 64)
    each = max(built(few)[1] - below, 1) / max(few, 1)
    high = min(cap, int((length - below) / each * 1.05) + 8)
    while (above := built(high)[1]) <= length and high < cap:
        high = min(cap, 2 * high)
    if above < 0.9 * length:
        what = "give more prose by --path" if task in PROSE else "there are no more words"
        raise ValueError(f"--lengths={length} is not allowed: {task} has {above} tokens at most; {what}")
    if above <= length:
        return built(high)[0]
    while high - low > 1:
        middle = low + int((length - below) * (high - low) / (above - below))
        middle = min(max(middle, low + 1), high - 1)
        found, tokens = built(middle)
        if tokens <= length:
            row, low, below = found, middle, tokens
        else:
            high, above = middle, tokens
    return row


def _spans(units: list[str], places: list[int]) -> list[list[int]]:
    starts, at = [], 0
    for unit in units:
        starts.append(at)
        at += len(unit) + 1
    return [[starts[n], starts[n] + len(units[n])] for n in places]


def _row(task, length, context, needles, answers, asked) -> dict:
    room = TOKENS[task.split("_")[0]]
    about = {"answer": answers, "max_new_tokens": room, "task": task, "length": length, "needles": needles}
    return {"context": context, **asked, **about}


def _some(sentences: Iterable[str], letters: int) -> Iterator[str]:
    """The first of them, of so many letters in all."""
    for sentence in sentences:
        if letters <= 0:
            return
        yield sentence
        letters -= len(sentence) + 1


def _enough(task: str, length: int, count: int) -> None:
    if count < 1:
        raise ValueError(f"--lengths={length} is not allowed: too short for {task} with --shared")


def _sharing(task: str, length: int, tokenizer, seed: int, essay: list[str]) -> dict:
    if task in WHOLE:
        raise ValueError(f"--shared is not allowed with {task}: its cases have nothing in common")
    most, draw = length - OUTSIDE - TOKENS[task.split("_")[0]], random.Random(f"{task}/{length}/{seed}")
    if task in STACKS:
        stack = _needles(random.Random(f"{task}/{length}"), max(1, most // 8), *STACKS[task])
        count = bisect_right(begun(stack[0], tokenizer)[1], most) - 1
        _enough(task, length, count)
        units, places, answers, asked = _multikey(draw, count, task, [part[:count] for part in stack])
        return _row(task, length, " ".join(units), _spans(units, places), answers, asked)
    filler = list(_some(essay, LETTERS * length)) if task in PROSE else _noise(length // 3)
    ids, starts = begun(filler, tokenizer)
    if len(ids) < 0.9 * most:
        raise ValueError(f"--lengths={length} is not allowed: the prose has {len(ids)} tokens; give more by --path")
    count = bisect_right(starts, most) - 1 if len(ids) > most else len(filler)
    _enough(task, length, count)
    units, places, answers, asked = TASKS[task](draw, count, essay)
    try:
        context, spans = in_place(units, tokenizer)
    except ValueError as error:
        raise ValueError(f"--lengths={length} is not allowed for {task} with --shared: {error}") from error
    which = [n for n, unit in enumerate(units) if isinstance(unit, Fact)]
    return _row(task, length, context, [[*spans[which.index(n)]] for n in places], answers, asked)


def score(task: str, answer: str, references: list[str]) -> float:
    """Share of the references that the answer has, upper and lower case alike; of qa1, as BABILong does it."""
    if task == "qa1":
        return babilong.score(answer, references)
    return sum(reference.lower() in answer.lower() for reference in references) / len(references)


def settled(task: str, answer: str, references: list[str]) -> bool:
    """Whether more words could not change the score of what was said so far."""
    if task == "qa1":
        return bool(re.search(r"[.\n]", answer.strip()))
    return score(task, answer, references) == 1
