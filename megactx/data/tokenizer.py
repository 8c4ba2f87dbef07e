"""The tokenizer: trained here as byte-level BPE, loaded from any Hugging Face folder.

Text of a user is always encoded as text: a special-token string such as ``<|bos|>`` inside a document becomes
ordinary bytes, never the special token.
"""

import copy
import hashlib
import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

BOS, PAD, END = "<|bos|>", "<|pad|>", "<|end|>"
ROLES = ("system", "user", "assistant")
CHAT = (*(f"<|{role}|>" for role in ROLES), END)
# A turn is its role, what is said, and END: nothing else, so that no word of it touches a sign of the template. What
# stands between ``generation`` and ``endgeneration`` is an answer, for libraries that train on answers alone.
TEMPLATE = (
    "{{- bos_token -}}{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('role ' + message['role'] + ' is not known: system, user or assistant') -}}{%- endif -%}"
    "{{- '<|' + message['role'] + '|>' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|end|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- message['content'] + '<|end|>' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int, progress: bool = True, chat: bool = False):
    """Train a byte-level BPE tokenizer (Sennrich et al. 2016; byte level as in GPT-2) with single-digit numbers.

    Args:
        texts: the training documents.
        vocab_size: number of ids, special tokens included; at least 258 (256 bytes, BOS, PAD).
        progress: show the trainer's own progress bar.
        chat: with ``TEMPLATE`` and its special tokens, ids 2 to 5; an answer ends with ``END``, which is EOS then.

    Returns:
        A ``transformers.PreTrainedTokenizerFast`` whose id 0 is BOS and id 1 is PAD.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = (BOS, PAD, *(CHAT if chat else ()))
    if vocab_size < 256 + len(special):
        least = f"{256 + len(special)} or more (256 bytes and {len(special)} special tokens)"
        raise ValueError(f"vocab_size is {vocab_size}, allowed is {least}")
    bpe = Tokenizer(models.BPE())
    # One digit per token: a small model that sees "1987" as one id cannot copy or compare numbers.
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(special),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=progress,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=BOS, pad_token=PAD)
    return _as_text(with_chat(tokenizer) if chat else tokenizer)


def with_chat(tokenizer):
    """The tokenizer itself where it brings a chat template; else a copy with ``TEMPLATE`` and its special tokens.

    They come behind all other ids, and what the tokenizer does to a text stays as it is.
    """
    from tokenizers import AddedToken

    if tokenizer.chat_template:
        return tokenizer
    own = copy.deepcopy(tokenizer)
    own.add_tokens([AddedToken(token, special=True, normalized=False) for token in CHAT], special_tokens=True)
    own.chat_template = TEMPLATE
    if own.eos_token is None:
        own.eos_token = END
    return own


def load_chat_tokenizer(folder: str | Path):
    """``load_tokenizer``, ``with_chat``."""
    return with_chat(load_tokenizer(folder))


def load_tokenizer(folder: str | Path):
    """Load the tokenizer of a Hugging Face name, of a folder, of a GGUF file, or of an asset (``asset:NAME``).

    Raises:
        ValueError: the folder holds no tokenizer.
    """
    from transformers import AutoTokenizer

    from .gguf_base import loadable

    found = loadable(folder, "tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(found, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"tokenizer={folder}: no tokenizer could be loaded from there ({error})") from error
    if not tokenizer("text", add_special_tokens=False)["input_ids"]:  # some classes load without any file, empty
        raise ValueError(f"tokenizer={folder}: it has no vocabulary; is tokenizer.json missing?")
    return _as_text(tokenizer)


def _as_text(tokenizer):
    tokenizer.split_special_tokens = True  # read at every call, and overrides the backend's own flag
    return tokenizer


def bos_id(tokenizer) -> int:
    """The id that opens every document: BOS, or EOS where the tokenizer has no BOS (GPT-2 style)."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    where = f"tokenizer={tokenizer.name_or_path}"
    raise ValueError(f"{where}: it has neither a BOS nor an EOS token; set bos_token in its tokenizer_config.json")


def tokenizer_hash(tokenizer) -> str:
    """Identity of a tokenizer (16 hex digits): of all that it does to a text, without how far it cuts or fills it up.

    Two with one vocabulary may still split texts otherwise.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return vocabulary_hash(tokenizer)
    return _state_hash(backend.to_str(), bool(getattr(tokenizer, "split_special_tokens", False)))


@lru_cache(maxsize=4)  # a session asks with every save, and what is sorted here is the whole vocabulary
def _state_hash(text: str, split: bool) -> str:
    state = {k: v for k, v in json.loads(text).items() if k not in ("truncation", "padding")}
    return hashlib.sha256(json.dumps([state, split], sort_keys=True).encode()).hexdigest()[:16]


def vocabulary_hash(tokenizer) -> str:
    """A hash of its vocabulary and of how it encodes a fixed probe text: what sessions were saved with before."""
    probe = "The probe: naïve 1987 <|bos|>\n\tdef f(x): return {'a': x}  # ok 你好"
    digest = hashlib.sha256()
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1]):
        digest.update(f"{index}\0{token}\n".encode("utf-8", "surrogatepass"))
    digest.update(repr(tokenizer(probe, add_special_tokens=False)["input_ids"]).encode())
    return digest.hexdigest()[:16]


class TextEncoder:
    """Text -> ids, at the beginning of a history and behind one.

    Some tokenizers write a space before the first word of all that they are given. Behind a history that is a space
    which nobody wrote.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.behind = _without_prefix(tokenizer)

    def __call__(self, text: str, begins: bool, plain: bool = True) -> list[int]:
        """text -> ids.

        Args:
            begins: nothing stands before it.
            plain: special tokens in it are text like any other.
        """
        if not text:
            return []
        if begins or self.behind is None:
            given = {"add_special_tokens": False, "split_special_tokens": plain, "verbose": False}
            return self.tokenizer(text, **given)["input_ids"]
        self.behind.encode_special_tokens = plain
        return self.behind.encode(text, add_special_tokens=False).ids

    def opening(self, signs: str) -> list[int]:
        """Signs of a chat template that open a talk, without BOS in front -> ids; BOS is not among them."""
        bos = self.tokenizer.bos_token or ""
        ids = self(bos + signs, begins=True, plain=False)
        return ids[1:] if bos and ids[0] == self.tokenizer.bos_token_id else ids


def _without_prefix(tokenizer):
    """A copy of the tokenizer's backend that writes no space before a text; ``None`` where it never does."""
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    state = json.loads(backend.to_str())
    pruned = {what: _pruned(state[what]) for what in ("normalizer", "pre_tokenizer")}
    if all(state[what] == part for what, part in pruned.items()):
        return None
    state |= pruned | {"truncation": None, "padding": None}
    for token in state["added_tokens"]:  # what they are looked for as: a prefix is a part of it
        if token["normalized"] and backend.normalizer is not None:
            token["content"] = backend.normalizer.normalize_str(token["content"])
    return Tokenizer.from_str(json.dumps(state))


def _pruned(part: dict | None) -> dict | None:
    """A part of a tokenizer's description without what adds a space in front."""
    if part is None or part["type"] == "Prepend":
        return None
    if part["type"] == "Sequence":
        name = next(name for name in ("normalizers", "pretokenizers") if name in part)
        return part | {name: [inner for inner in map(_pruned, part[name]) if inner is not None]}
    own = {"Metaspace": {"prepend_scheme": "never"}, "ByteLevel": {"add_prefix_space": False}}
    return part | {name: value for name, value in own.get(part["type"], {}).items() if name in part}
