"""From a saved tree to a package: its text is looked through for secrets, samples are taken, and it is signed."""

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from detect_secrets.core.scan import scan_line
from detect_secrets.settings import transient_settings

from megactx.data.tokenizer import tokenizer_hash
from megactx.memory.curation import Curated

from ..curation import held
from . import package
from .package import Card, Sample, Source

# Those of detect-secrets that know a form. Its guesses by entropy, and by a word such as "password", stop plain texts.
FORMS = (
    "Artifactory AWSKey AzureStorageKey BasicAuth DiscordBotToken GitHubToken GitLabToken JwtToken Mailchimp Npm OpenAI"
    " PrivateKey PypiToken SendGrid Slack SquareOAuth Stripe TelegramBotToken TwilioKey"
).split()
PIECE = 8_192  # tokens that are decoded at a time
LONGEST = 20_000  # characters of a line that is looked at in one


@dataclass(frozen=True)
class Secret:
    """What looks like one.

    Attributes:
        kind: as detect-secrets calls it.
        where: in words.
        mark: of its line; ``--allow MARK`` lets it pass.
    """

    kind: str
    where: str
    mark: str


def pack(
    folder: Path, path: Path, tokenizer, key, about: dict, allowed: Iterable[str] = (), saw=lambda tokens, of: None
) -> Card:
    """Write a saved tree, or that of a session, as a package.

    Args:
        tokenizer: of the tree's base LM.
        key: the author's.
        about: ``name``, ``version``, ``licence``, ``description``, ``provenance``.
        allowed: marks of what looks like a secret, and is none.
        saw: called with tokens that were looked at, and all there are.

    Raises:
        ValueError: no tree, one in use or of several rows, no licence, or something that looks like a secret.
        RunFailed: the disk is full.
    """
    licence = package.licence_of(about["licence"])
    with held(folder) as place, tempfile.TemporaryDirectory(prefix="megactx-package-") as scratch:
        tree = Curated(place)
        if tree.tokens == 0:
            raise ValueError(f"{folder}: the tree is empty")
        if len(tree.levels) == 1:
            raise ValueError(f"{folder}: the tree has no whole block")
        sources = sources_of(tree, place)
        card = Card(
            format=package.FORMAT,
            **about | {"licence": licence},
            model=package.model_of(tree.about, tokenizer_hash(tokenizer)),
            tokens=tree.tokens,
            sources=sources,
            samples=samples_of(tree, tokenizer),
            files=package.tree_files(tree, Path(scratch)),
        )
        told = json.dumps(card.model_dump(exclude={"files", "model"}), ensure_ascii=False).replace("\\n", "\n")
        found = [*secrets("its description", told.splitlines())]
        found += secrets("the tree", lines_of(tree, tokenizer, saw))
        if left := [secret for secret in found if secret.mark not in allowed]:
            shown = "; ".join(f"{s.kind} in {s.where} (mark {s.mark})" for s in left[:5])
            more = f" and {len(left) - 5} more" if len(left) > 5 else ""
            raise ValueError(f"{folder}: it may hold secrets: {shown}{more}. --allow MARK lets one pass that is none")
        package.write(path, card, Path(scratch), key)
    return card


def sources_of(tree: Curated, folder: Path) -> list[Source]:
    """The documents of a followed part, which its table beside the tree names; else what was merged into the tree."""
    table = folder.with_name(f"{folder.name}.json")
    starts = [(name, first[0]) for name, first in tree.about["parts"]]
    if table.is_file():
        try:
            documents, at, named = json.loads(table.read_text(encoding="utf-8"))["documents"], 0, []
            for document in documents:
                named.append((document["name"], at))
                at += document["tokens"]
            if at == tree.tokens and named:
                starts = named
        except (ValueError, KeyError, TypeError, AttributeError):
            pass  # another file of that name
    starts = [(name, start) for name, start in starts if start < tree.tokens]
    ends = [start for _, start in starts[1:]] + [tree.tokens]
    out = []
    for (name, start), end in zip(starts, ends, strict=True):
        digest = hashlib.sha256()
        for first in range(start, end, PIECE):
            digest.update(tree.levels[0].span("token", first, min(first + PIECE, end)).numpy().tobytes())
        out.append(Source(name=name[:500], start=start, tokens=end - start, sha256=digest.hexdigest()))
    return out


def samples_of(tree: Curated, tokenizer) -> list[Sample]:
    """Texts of blocks that have their tokens, evenly spread."""
    blocks = (tree.floor == 0).nonzero()[:, 0].tolist()
    out = []
    for n in range(min(package.SAMPLES, len(blocks))):
        start = blocks[n * len(blocks) // package.SAMPLES if len(blocks) > package.SAMPLES else n] * tree.size
        ids = tree.levels[0].span("token", start, start + tree.size)[0].tolist()
        out.append(Sample(start=start, text=tokenizer.decode(ids)[: package.SAMPLE]))
    return out


def lines_of(tree: Curated, tokenizer, saw) -> Iterator[str]:
    """All that the tree still has as tokens; a line that pieces cut is one again."""
    rest = ""
    for first in range(0, tree.tokens, PIECE):
        end = min(first + PIECE, tree.tokens)
        *lines, rest = (rest + tokenizer.decode(tree.levels[0].span("token", first, end)[0].tolist())).split("\n")
        yield from lines
        saw(end, tree.tokens)
    yield rest


def secrets(where: str, lines: Iterable[str]) -> Iterator[Secret]:
    """What looks like a secret in lines of text."""
    with transient_settings({"plugins_used": [{"name": f"{form}Detector"} for form in FORMS]}):
        for number, line in enumerate(lines, 1):
            for start in range(0, max(1, len(line)), LONGEST - 500):  # what is cut stands whole in the next
                piece = line[start : start + LONGEST]
                for found in scan_line(piece):
                    mark = hashlib.sha256(f"{found.type} {piece.strip()}".encode("utf-8", "replace")).hexdigest()[:12]
                    yield Secret(found.type, f"{where}, line {number:,}", mark)
