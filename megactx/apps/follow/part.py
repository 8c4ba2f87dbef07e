"""The tree of one source, and where each block of it is from.

    MEMORY/NAME/        a tree, see ``memory.storage``; whoever has it open reads on what was there
    MEMORY/NAME.json    its documents in their order: name, mark, first token, and the line in which each block begins

A document is whole blocks, filled up with line ends. So one that changes is exchanged without its neighbours: their
gists are kept, and of higher levels those of spans that stand where they stood.
"""

import hashlib
import json
import time
from bisect import bisect_right
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from megactx.framework import files
from megactx.framework.lock import Lock
from megactx.memory import MegaContextTree
from megactx.parts.models import Models
from megactx.runtime.text import filling

FORMAT = 1
BETWEEN = "\n\n"  # documents
GONE = 1000  # newest documents that are known to have been there


@dataclass
class Document:
    """Of the tree.

    Attributes:
        name, mark: of the source.
        tokens: in whole blocks.
        lines: of the text, from 1, in which each block begins; of a block of nothing but filling the last line.
        at: when it was taken up, seconds since 1970.
    """

    name: str
    mark: str
    tokens: int
    lines: list[int] = field(default_factory=list)
    at: float = 0.0


class Part:
    """The tree of a source, held by this process.

    Args:
        folder: of the tree.
        models: base LM and GistNet.
        root: folder that the documents' names are relative to; ``None``: they are no paths.

    Raises:
        ValueError: another process holds it, it is damaged, or it is of other models.
    """

    def __init__(self, folder: str | Path, models: Models, root: Path | None = None):
        folder = Path(folder)
        self.folder, self.models, self.root = folder, models, root
        self.table, self._next = folder.with_name(f"{folder.name}.json"), folder.with_name(f"{folder.name}.next.json")
        busy = f"{folder} is followed by process {{holder}} already"
        self._lock = Lock(folder.with_name(f"{folder.name}.lock"), busy)
        self.documents: list[Document] = []
        self.licence = ""  # of the texts; empty: none is noted
        self.gone: dict[str, float] = {}
        self.tree = self._empty()
        try:
            self._load()
        except BaseException:
            self.close()
            raise
        self.end = filling(models.base.tokenizer)

    def close(self) -> None:
        """Give it free."""
        self._lock.release()

    @property
    def marks(self) -> dict[str, str]:
        """name -> mark of what is in the tree."""
        return {document.name: document.mark for document in self.documents}

    def change(self, new: dict[str, tuple[str, str]], gone: set[str]) -> None:
        """Take up documents, name -> (mark, text), in place of those of the same name; and leave some out. All or none.

        Raises:
            RunFailed: the disk is full. What was there is there.
            ValueError: it cannot be written.
        """
        made = {name: self._made(name, mark, text) for name, (mark, text) in new.items()}
        tree, documents, start, kept = None, [], 0, 0
        for document in self.documents:
            stop = start + document.tokens
            if document.name in new or document.name in gone:
                tree = self._with(tree, kept, start)
                kept = stop
                if document.name in new:
                    fresh, ids = made.pop(document.name)
                    tree, documents = self._appended(tree, ids), [*documents, fresh]
            else:
                documents.append(document)
            start = stop
        tree = self._with(tree, kept, start)
        for fresh, ids in made.values():
            tree, documents = self._appended(tree, ids), [*documents, fresh]
        now = time.time()
        left = {name: now for name in gone if name in self.marks}
        tombs = {name: at for name, at in (self.gone | left).items() if name not in new}
        self._save(tree if tree is not None else self._empty(), documents, dict([*tombs.items()][-GONE:]))

    def note_licence(self, licence: str) -> None:
        """Note the licence of the texts in the table; a part that is not there yet has it with its first document.

        Raises:
            RunFailed: the disk is full. What was there is there.
            ValueError: it cannot be written.
        """
        before, self.licence = self.licence, licence
        try:
            if self.table.is_file() and licence != before:
                files.write(self.table, self._content(self.tree, self.documents, self.gone))
        except BaseException:
            self.licence = before
            raise

    def source_of(self, token: int) -> tuple[str, int]:
        """Where a token is from: the document's name, and the line in which its block begins.

        Raises:
            ValueError: there is no such token.
        """
        starts = [0]
        for document in self.documents:
            starts.append(starts[-1] + document.tokens)
        if not 0 <= token < starts[-1]:
            raise ValueError(f"token={token} is not allowed: 0 to {starts[-1] - 1}")
        number = bisect_right(starts, token) - 1
        document = self.documents[number]
        return document.name, document.lines[(token - starts[number]) // self.tree.block_size]

    def _empty(self) -> MegaContextTree:
        return MegaContextTree(self.models.gistnet, self.models.base, device=self.models.base.model.device)

    def _with(self, tree: MegaContextTree | None, start: int, stop: int) -> MegaContextTree | None:
        """A tree, and tokens start .. stop - 1 of the one that is there behind it."""
        if start == stop:
            return tree
        if tree is None:
            return self.tree.slice(start, stop)
        if tree.hidden:  # what it makes of a block depends on all that came before
            return self._appended(tree, self.tree.slice(start, stop).tokens[0].long())
        tree.merge(self.tree.slice(start, stop))
        return tree

    def _appended(self, tree: MegaContextTree | None, ids: torch.Tensor) -> MegaContextTree:
        tree = self._empty() if tree is None else tree
        if len(ids):
            tree.append(ids[None].to(tree.device))
        return tree

    def _made(self, name: str, mark: str, text: str) -> tuple[Document, torch.Tensor]:
        whole = f"{text.rstrip(chr(10))}{BETWEEN}" if text.strip() else ""
        told = self.models.base.tokenizer(
            whole,
            add_special_tokens=False,
            split_special_tokens=True,  # what looks like one is text
            return_offsets_mapping=True,
            verbose=False,
        )
        ids, block = told["input_ids"], self.tree.block_size
        ends = [place for place, sign in enumerate(whole) if sign == "\n"]
        last = len(ends) - 1  # the two behind the text begin no line of it
        lines = [min(last, bisect_right(ends, first - 1) + 1) for first, _ in told["offset_mapping"][::block]]
        ids = torch.tensor(ids + [self.end] * (-len(ids) % block), dtype=torch.long)
        return Document(name, mark, len(ids), lines, time.time()), ids

    def _save(self, tree: MegaContextTree, documents: list[Document], gone: dict[str, float]) -> None:
        # Whether a kill has come before or behind the tree's own rename, one of the two tables is of the tree there.
        files.write(self._next, self._content(tree, documents, gone))
        tree.save(self.folder)
        self._next.replace(self.table)
        self.tree, self.documents, self.gone = tree, documents, gone

    def _content(self, tree: MegaContextTree, documents: list[Document], gone: dict[str, float]) -> str:
        """Of the table."""
        root = None if self.root is None else str(self.root.absolute())
        content = {"format": FORMAT, "tree": _digest(tree), "gone": gone, "root": root}
        if self.licence:
            content["licence"] = self.licence
        content["documents"] = [asdict(document) for document in documents]
        return json.dumps(content) + "\n"

    def _load(self) -> None:
        known = []
        for path in (self._next, self.table):
            if path.is_file():
                known.append((path, _table(path)))
        if not known:
            return
        if not self.folder.is_dir():  # killed before the first tree was there
            self._next.unlink(missing_ok=True)
            return
        device = self.models.base.model.device
        tree = MegaContextTree.load(self.folder, self.models.gistnet, self.models.base, device=device)
        digest = _digest(tree)
        path, found = next(((p, t) for p, t in known if t["tree"] == digest), (None, None))
        if path is None:
            raise ValueError(f"{self.table}: it is not of the tree in {self.folder}; remove both to read all anew")
        if path == self._next:
            self._next.replace(self.table)
        self._next.unlink(missing_ok=True)
        self.tree, self.gone, self.licence = tree, found["gone"], str(found["licence"])
        self.documents = [Document(**document) for document in found["documents"]]


def _table(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']}")
        [Document(**document) for document in found["documents"]]
        return {name: found[name] for name in ("tree", "gone", "documents")} | {"licence": found.get("licence", "")}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: it is damaged ({error})") from error


def _digest(tree: MegaContextTree) -> str:
    return hashlib.sha256(tree.tokens.cpu().contiguous().numpy().tobytes()).hexdigest()[:16]
