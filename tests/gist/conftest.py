"""Base LMs that make the tests of this room mean something."""

import pytest


@pytest.fixture(scope="session")
def make_base():
    """kind -> a small frozen base LM with random weights that make it care about what it reads."""
    from small_base import small

    def make(kind="llama"):
        base = small(kind)
        for p in base.parameters():
            p.data *= 1.5
        return base

    return make


@pytest.fixture(scope="session")
def words():
    """A tokenizer of five words, for bases that have none."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["a", "b", "c", "say", "it"])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner)
