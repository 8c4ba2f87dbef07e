"""Documents that ask for something exact: a number, a UUID, a name, a path, a word, told once and asked for later.

    [sink] [text] ... [ The port of Alder is 4821. text ] ... [text] | text ... The port of Alder is | 4821
                      one block, old by now                            R raw tokens                    the answer

What is told starts on a block's first token, and takes as many blocks as it needs: a UUID is longer than 32 tokens
where a tokenizer keeps digits apart.

The text around is real. Told and asked in the same words, so a base LM that can copy can answer. In the spirit of
"needle in a haystack" and of the passkey task of Mohtashami & Jaggi 2023 (arXiv 2305.16300).

K block, R recency, A tokens of the answer.
"""

import uuid
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

TOPICS = ("Alder", "Birch", "Cedar", "Elm", "Hazel", "Juniper", "Larch", "Maple", "Oak", "Rowan", "Spruce", "Willow")
FIRST = ("Anna", "Boris", "Clara", "David", "Edith", "Frank", "Grace", "Henry", "Irene", "Jonas", "Laura", "Martin")
LAST = ("Adler", "Brooks", "Carter", "Dalton", "Ellis", "Fischer", "Grant", "Hughes", "Irving", "Keller", "Morgan")
FOLDERS = ("bin", "cache", "data", "etc", "home", "lib", "log", "media", "opt", "share", "src", "tmp", "usr", "var")
WORDS = ("anchor", "basket", "candle", "desert", "engine", "forest", "garden", "hammer", "island", "jacket", "kitchen")


def _pick(rng, options) -> str:
    return options[int(rng.integers(len(options)))]


KINDS: dict[str, tuple[str, Callable]] = {  # class -> what is told, how its value is drawn
    "number": ("port", lambda rng: str(rng.integers(1000, 99999))),
    "uuid": ("id", lambda rng: str(uuid.UUID(bytes=rng.bytes(16), version=4))),
    "name": ("owner", lambda rng: f"{_pick(rng, FIRST)} {_pick(rng, LAST)}"),
    "path": ("file", lambda rng: "/" + "/".join(_pick(rng, FOLDERS) for _ in range(3)) + f"/{_pick(rng, WORDS)}.txt"),
    "word": ("code word", lambda rng: _pick(rng, WORDS)),
}


@dataclass(frozen=True)
class Probe:
    """One document with its question at the end."""

    kind: str  # of KINDS
    ids: np.ndarray  # int64 [T]: everything up to the question's last token, then the answer
    told: int  # start of the block in which the answer is told
    asked: int  # first token of the answer, on the block grid
    answer: str
    blocks: int = 1  # over so many blocks

    @property
    def length(self) -> int:
        """A, tokens of the answer."""
        return len(self.ids) - self.asked


def make_probes(
    tokenizer, texts: list[np.ndarray], per_kind: int, block: int, recency: int, blocks: int, seed: int = 0
) -> list[Probe]:
    """Probes of every class, the same for the same seed.

    Args:
        tokenizer: of the base LM.
        texts: token ids of real documents, each of at least (blocks + 1) K + R tokens.
        per_kind: probes of each class.
        block, recency: K and R, tokens.
        blocks: old blocks M of each document; the answer is told in one of them, or in a few neighbours, at random.
        seed: of topics, values, places.

    Raises:
        ValueError: no text is long enough, or a told sentence does not fit into the old blocks.
    """
    length = (blocks + 1) * block + recency
    texts = [text for text in texts if len(text) >= length]
    if not texts:
        raise ValueError(f"probes: no text has {length} tokens, (blocks={blocks} + 1) x {block} + {recency}")
    rng, out = np.random.default_rng(seed), []
    for kind, (what, draw) in KINDS.items():
        for _ in range(per_kind):
            answer, topic = draw(rng), _pick(rng, TOPICS)
            question = f"\nThe {what} of {topic} is"
            asked = tokenizer.encode(question, add_special_tokens=False)
            told = tokenizer.encode(f"{question} {answer}", add_special_tokens=False)
            taken = -(-len(told) // block)
            if told[: len(asked)] != asked or taken > blocks:
                raise ValueError(f"probes: {question!r} takes {len(told)} tokens, above blocks={blocks} of {block}")
            ids = np.array(texts[int(rng.integers(len(texts)))][:length], dtype=np.int64)
            place = block * int(rng.integers(1, blocks - taken + 2))
            ids[place : place + len(told)] = told
            ids[length - len(asked) :] = asked
            out.append(Probe(kind, np.concatenate([ids, told[len(asked) :]]), place, length, answer, taken))
    return out
