"""Sentences that cover the words of a question, alone or with another one that a rare word joins to them."""

import math
import re
from bisect import bisect_right
from collections import Counter, defaultdict
from itertools import accumulate

from . import filled

WORD, SENTENCE = re.compile(r"\w+"), re.compile(r"(?<=[.!?])\s+|\s*\n\s*")
LONGEST = 3  # blocks that a sentence may touch; what is longer, such as a table, is cut at their borders
FIRST = 32  # sentences that may begin a pair
RARE = 0.01  # of the sentences, that a joining word is in at most; in four it may always be
LENGTH, SECOND = 0.05, 4.0  # what a word of a sentence, and a second sentence, must add to what is covered


class Bridge:
    """Blocks of single sentences and of pairs, in the order of the question's rare words that they cover together.

    "The metal of the teacher of Belodar" is in no sentence. But "Belodar's teacher is Minok" leaves *metal* open and
    has a rare word that the question has not, and "Minok's metal is tin" has both. Such a word is the bridge of a
    question of two hops (Yang et al. 2018, arXiv 1809.09600). Sentences may cross the borders of blocks.
    """

    def __init__(self):
        self.blocks, self.text = None, None

    def keep(self, asked, budget):
        if self.blocks is not asked.blocks:  # questions about one text follow each other
            self.blocks, self.text = asked.blocks, Sentences(asked.blocks)
        order = [block for sentence in self.text.order(asked.question) for block in self.text.places[sentence]]
        return filled(asked, budget, [*dict.fromkeys(order)], 0)


class Sentences:
    """The sentences of a text: ``words`` of each, ``places``, the blocks that it stands in, and ``having``, in which
    a word stands."""

    def __init__(self, blocks: list[str]):
        text, ends = "".join(blocks), [*accumulate(map(len, blocks))]
        self.words, self.places, at = [], [], 0
        for end, then in [*(match.span() for match in SENTENCE.finditer(text)), (len(text), len(text))]:
            touched = range(bisect_right(ends, at), min(bisect_right(ends, max(at, end - 1)) + 1, len(blocks)))
            if len(touched) <= LONGEST:
                self.words.append(words_of(text[at:end]))
                self.places.append(touched)
            else:
                self.words += (words_of(blocks[block]) for block in touched)
                self.places += (range(block, block + 1) for block in touched)
            at = then
        self.having = defaultdict(list)
        for sentence, words in enumerate(self.words):
            for word in words:
                self.having[word].append(sentence)

    def weight(self, word: str) -> float:
        """The square of its idf of Okapi BM25: words as frequent as *of* and *the* must not join sentences."""
        count, found = len(self.words), len(self.having.get(word, ()))
        return math.log(1 + (count - found + 0.5) / (found + 0.5)) ** 2

    def order(self, question: str) -> list[int]:
        """Sentences that share a word with the question, the best pair or single one first."""
        asked = words_of(question)
        covered = Counter()
        for word in sorted(asked):  # sums of floats in one order
            for sentence in self.having.get(word, ()):
                covered[sentence] += self.weight(word)
        worth = {sentence: value - LENGTH * len(self.words[sentence]) for sentence, value in covered.items()}
        first = sorted(worth, key=lambda sentence: (-worth[sentence], sentence))
        found = [(worth[sentence], (sentence,)) for sentence in first]
        rare = max(4, RARE * len(self.words))
        for one in first[:FIRST]:
            left = asked - self.words[one]
            bridges = [word for word in self.words[one] - asked if len(self.having[word]) <= rare]
            for other in sorted({sentence for word in bridges for sentence in self.having[word]} - {one}):
                if more := self.words[other] & left:
                    gained = sum(map(self.weight, sorted(more))) - LENGTH * len(self.words[other]) - SECOND
                    found.append((worth[one] + gained, (one, other)))
        found.sort(key=lambda pair: -pair[0])
        return [*dict.fromkeys(sentence for _, sentences in found for sentence in sentences)]


def words_of(text: str) -> set[str]:
    return {*WORD.findall(text.lower())}
