"""Files into a session over the workers of Ray: the tokens and gists that one process makes, bit for bit.

    1. workers tokenise files              OUT.parts/texts-1f0c.../text    ids, and where each piece of a file ends
    2. workers make gists of a range       OUT.parts/gists-07aa.../tree    the tree of its tokens, of two levels
    3. this process puts the ranges behind each other; no text is read back, and no gist of theirs made again but those
       whose left context lies before their range

A range begins at a multiple of 16 K^2 tokens of the history: so its blocks lie in their batches as in a tree of all of
it (see ``memory.encoding``). What a shard leaves is named by its content, so a second start finds what is there. When
the session is saved, OUT.parts goes.
"""

import functools
import hashlib
import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megactx.data.encoding import batches
from megactx.data.tokenizer import TextEncoder, tokenizer_hash
from megactx.framework.files import checksum, replacing
from megactx.framework.workers import Counted, Each
from megactx.memory import MegaContextTree, encoding, storage
from megactx.memory.interchange import MANIFEST
from megactx.runtime import Session, load_models

from . import ingest

TEXT = 2**24  # bytes of files that are tokenised together
RANGE = 2**17  # tokens of a range, about
LEVELS = 2  # of a range's tree; the few nodes above are made here
REMEDY = "name another OUT: its parts lie beside it"

models = functools.cache(load_models)  # of a worker, which has many shards


@dataclass(frozen=True)
class Text:
    """Files to tokenise.

    Attributes:
        model: as of ``load_models``.
        files: path, sha256, and the characters that the session has already.
        begins: nothing stands before the first of them.
        piece: characters that are tokenised at a time.
        folder: of the result.
    """

    model: str | None
    files: tuple[tuple[str, str, int], ...]
    begins: bool
    piece: int
    folder: Path


@dataclass(frozen=True)
class Range:
    """Tokens to make gists of.

    Attributes:
        model: as of ``load_models``.
        ids: int32 [T].
        first: token of the history that is the first of ``ids``.
        folder: of the result.
    """

    model: str | None
    ids: np.ndarray
    first: int
    folder: Path


def take(session: Session, paths: list[Path], folder: Path, model: str | None, each: Each) -> None:
    """Read files that the session has not read yet, as ``ingest.take`` does.

    Args:
        folder: of the parts, on a disk that all workers see.
        model: of the session.
        each: of ``framework.workers``.

    Raises:
        ValueError: a file that is not text, or has changed since; a GistNet that reads hidden states.
        RunFailed: the worker of a shard was lost each time.
    """
    if session.tree.hidden:
        raise ValueError("--engine=ray is not allowed: this GistNet reads hidden states, which depend on all before")
    ingest.settle(session)
    texts, steps, ids, whole = list(_texts(session, paths, folder, model)), deque(), [], session.length
    for text in each(tokenise, texts, "files"):
        ids.append(np.load(text / "ids.npy", mmap_mode="r"))
        for name, then, tokens in json.loads((text / "pieces.json").read_text(encoding="utf-8")):
            steps.append((name, then, whole, whole + tokens))
            whole += tokens
    clock, own, whole = ingest.SaveClock(session, ingest.SAVE_EVERY), session.controller.models, session.length
    try:
        for first, last, path in each(make_gists, _ranges(session, ids, folder, model), "gists"):
            part = MegaContextTree.load(path, own.gistnet, own.base, device=session.tree.device)
            while session.length < last:
                name, then, start, stop = steps[0]
                if "line" in then:
                    then["spans"] = ingest.spans_with(session, name, start, stop, then.pop("line"))
                ingest.about_to_take(session, name, stop, then)
                session.stream.go_on(part, first, min(stop, last))
                if session.length == stop:
                    ingest.settle(session)
                    steps.popleft()
                    whole = stop
                    clock.save_when_due()
    finally:
        if whole < session.length < (steps[0][3] if steps else 0):
            storage.shorten(session.tree, whole)  # a piece is there as a whole or not at all
        ingest.settle(session)


def tokenise(text: Text) -> Path:
    """Work of a worker: ids of files, and (name, what is then known of the file, tokens) of each piece; -> folder."""
    if text.folder.exists():
        return text.folder
    encoder, ids, pieces, begins = TextEncoder(models(text.model).base.tokenizer), [], [], text.begins
    for name, digest, skip in text.files:
        found = [
            ({"characters": first + len(part), "line": line}, part)
            for first, line, part in ingest.pieces(Path(name), skip, text.piece)
        ]
        if checksum(Path(name)) != digest:
            raise ValueError(f"{name} was changed while it was read; start again")
        for known, part in [*found, ({"whole": True}, ingest.BETWEEN)]:
            ids.append(np.asarray(encoder(part, begins=begins), dtype=np.int32))
            pieces.append((name, known, len(ids[-1])))
            begins = False
    with replacing(text.folder, REMEDY) as part:
        part.mkdir()
        np.save(part / "ids.npy", np.concatenate(ids))
        (part / "pieces.json").write_text(json.dumps(pieces), encoding="utf-8")
    return text.folder


def make_gists(job: Range) -> tuple[int, int, Path]:
    """Work of a worker: the tree of a range; -> its first token, the one behind its last, and the folder."""
    place = job.first, job.first + len(job.ids), job.folder
    if (job.folder / MANIFEST).exists():
        return place
    own = models(job.model)
    tree = MegaContextTree(own.gistnet, own.base, max_level=LEVELS, device=own.base.model.device)
    tree.append(torch.from_numpy(job.ids.astype(np.int64))[None])
    tree.export(job.folder)
    return place


def _texts(session: Session, paths: list[Path], folder: Path, model: str | None) -> Iterator[Text]:
    """Files that the session has not read whole, some at a time."""
    begins, tokenizer = session.length == 1, tokenizer_hash(session.tokenizer)
    unread = ((path, known) for path, known in ingest.unread(session, paths, print) if not known["whole"])
    for group in batches(unread, lambda one: one[0].stat().st_size, TEXT):
        files = tuple((str(path.absolute()), known["sha256"], known["characters"]) for path, known in group)
        key = _hash(repr((files, begins, ingest.PIECE, ingest.BETWEEN, tokenizer)).encode("utf-8", "surrogateescape"))
        yield Text(model, files, begins, ingest.PIECE, folder / f"texts-{key}" / "text")
        begins = False


def _ranges(session: Session, ids: list[np.ndarray], folder: Path, model: str | None) -> Counted:
    """The ranges of what is new in a session; the first one begins with what is there already."""
    tree, there = session.tree, session.length
    grid = encoding.BATCH * tree.block_size**LEVELS
    size = grid * max(1, RANGE // grid)
    begun = there // size * size
    ids = [session.ids(begun).numpy().astype(np.int32), *ids]
    starts = begun + np.cumsum([0, *map(len, ids)])
    places = range(begun, int(starts[-1]), size) if starts[-1] > there else ()
    made_by = f"{encoding.identity(tree.encoder)} {encoding.identity_of_base(tree.base)}".encode()

    def made(first: int) -> Range:
        near = zip(starts.tolist(), ids, strict=False)
        own = np.concatenate([part[max(0, first - at) : max(0, first + size - at)] for at, part in near])
        return Range(model, own, first, folder / f"gists-{_hash(made_by + own.tobytes())}" / "tree")

    return Counted(map(made, places), len(places))


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
