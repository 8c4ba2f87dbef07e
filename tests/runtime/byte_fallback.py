"""Tokenizers that write rare characters as single bytes, as those of Llama, Mistral and Gemma do; and random texts."""

import json
import random

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<s>", "</s>", "<|end|>"]
KINDS = ("prepend", "first", "none")  # Llama 1 and 2; Mistral; Gemma: which word gets a space that nobody wrote
ALPHABET = "abcde  \n\tàé你好🙂▁\ufffd<>|ث"


def byte_fallback(kind: str, texts: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of some 600 ids, 256 of them bytes."""
    space, learnt = normalizers.Replace(" ", "▁"), Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    learnt.normalizer, learnt.pre_tokenizer = space, pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False, limit_alphabet=60)
    learnt.train_from_iterator(texts, trainer)
    model = json.loads(learnt.to_str())["model"]
    pieces = [piece for piece in model["vocab"] if "\n" not in piece] + [f"<0x{value:02X}>" for value in range(256)]
    merges = [tuple(pair) for pair in model["merges"] if "\n" not in "".join(pair)]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    own = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    strip = [] if kind == "none" else [decoders.Strip(" ", 1, 0)]
    if kind == "first":
        own.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        own.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if kind == "prepend" else space
    own.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    own.add_special_tokens(SPECIAL)
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=own, split_special_tokens=True, **named)


def random_text(rng: random.Random) -> str:
    """Up to 20 characters: of a small alphabet with everything that is hard, or of anywhere."""
    size = rng.randrange(20)
    if rng.random() < 0.5:
        return "".join(rng.choice(ALPHABET) for _ in range(size))
    ranges = [(32, 127), (0x20, 0x2FF), (0x4E00, 0x9FFF), (0x1F300, 0x1F6FF)]
    return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(size))
