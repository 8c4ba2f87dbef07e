"""A session on disk: one small file names the folder that holds its tree and its state.

    FOLDER/session.json          which data folder counts, tokens, settings, tokenizer, parts
    FOLDER/tree/                 see ``memory.storage``
    FOLDER/data-1f0c.../state.safetensors
    FOLDER/curation.json         what another process wants to be taken away, see ``curation``; often not there
    FOLDER/lock                  held by the process that has the session open

A save brings the tree up to date, writes a new data folder, and then replaces ``session.json`` by one rename. So a kill
at any moment leaves the session as it was saved last, or as it is saved now: a tree only grows, and what it has behind
the tokens that ``session.json`` counts is forgotten by the next load. Data folders that nobody names any more are
removed by the next save or load. Sessions of format 1 have their tree in the data folder; those with parts have format
3, for programs of before know no parts.
"""

import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from megactx.data.tokenizer import tokenizer_hash, vocabulary_hash
from megactx.framework.files import PART, clear, replacing, sync, writing
from megactx.framework.lock import Lock
from megactx.memory import WorkingContext, storage
from megactx.memory.published import place_of

from .curation import HANDED
from .part_files import SESSION, TREE, Wanted
from .settings import HOW, Settings
from .stream import Stream

FORMAT, WITH_PARTS = 2, 3
MANIFEST, STATE, LOCK = SESSION, "state.safetensors", "lock"
DATA = re.compile(r"data-[0-9a-f]{16}")
OURS = re.compile(rf"data-[0-9a-f]{{16}}|{re.escape(HANDED)}|{re.escape(PART)}.*")
REMEDY = "save into another folder, which --session, OUT or /save name"
WINDOW = ("lod", "index")  # absent where no window was put together yet


def lock(folder: Path) -> Lock:
    """Hold a session's folder.

    Raises:
        ValueError: another process holds it, and the message says which; or the folder cannot be written.
        RunFailed: the disk is full.
    """
    busy = f"{folder} is in use by process {{holder}}: a session has one process at a time. End that one, or work on a"
    return Lock(folder / LOCK, f"{busy} copy of the folder", "a session keeps its files there; name another folder")


def check_free(folder: Path) -> None:
    """Refuse a folder that holds something else, or another session, before anything is written.

    Raises:
        ValueError: says which.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    if (folder / MANIFEST).exists():
        raise ValueError(f"{folder} holds another session: load it, or choose another folder")
    if folder.exists() and any(
        path.name not in (LOCK, TREE) and not OURS.fullmatch(path.name) for path in folder.iterdir()
    ):
        raise ValueError(f"{folder} holds other files and no session; choose an empty folder")


def save(stream: Stream, folder: Path, about: dict) -> None:
    """Write a stream of one row; the caller holds the lock.

    Args:
        about: plain JSON that comes back with the session.

    Raises:
        ValueError: nothing may be written there.
        RunFailed: the disk is full. What was saved before is whole.
    """
    with writing(folder, REMEDY):
        _save(stream, folder, about)


def _save(stream: Stream, folder: Path, about: dict) -> None:
    data, first = folder / f"data-{os.urandom(8).hex()}", not (folder / MANIFEST).exists()
    try:
        storage.save(stream.tree, folder / TREE, REMEDY)
        data.mkdir()
        save_file({name: tensor.cpu().contiguous() for name, tensor in _state(stream).items()}, data / STATE)
        for path in (data / STATE, data):
            sync(path)
        _name(stream, folder, data, about)
    except BaseException:
        if not storage.names(folder / MANIFEST, data.name):
            shutil.rmtree(data, ignore_errors=True)
            if first:
                shutil.rmtree(folder / TREE, ignore_errors=True)
                stream.tree.home = None  # the next save writes all of it
        raise
    _remove_all_but(folder, data)


def _name(stream: Stream, folder: Path, data: Path, about: dict) -> None:
    """From now on this data folder is the session's."""
    content = {
        "format": FORMAT,
        "data": data.name,
        "tokens": int(stream.lengths[0]),
        "tokenizer": tokenizer_hash(stream.base.tokenizer),
        "model": stream.models.name,
        "settings": stream.settings.as_dict(),
        "about": about,
    }
    if stream.parts:
        parts = [part.wanted.as_dict() | {"version": part.version, "slot": slot} for slot, part in stream.parts.items()]
        content |= {"format": WITH_PARTS, "parts": parts}
    with replacing(folder / MANIFEST, REMEDY) as part:
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _remove_all_but(folder: Path, data: Path) -> None:
    """What saves that were killed have left."""
    clear(folder)
    for path in folder.iterdir():
        if DATA.fullmatch(path.name) and path != data and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def load(
    folder: Path, models, settings: Settings, observers=(), parts: list[Wanted] = (), without: list[str] = ()
) -> tuple[Stream, dict, bool]:
    """Read a session; the caller holds the lock.

    Args:
        parts: to be read besides those that were saved with it, or in place of those of the same name.
        without: names of saved parts that are left out.

    Returns:
        The stream; what was saved as ``about``; whether its window came back, which it does under equal settings only.

    Raises:
        ValueError: no session, a damaged one, or one of another tokenizer, base LM or GistNet; a part is not there.
    """
    manifest = _manifest(folder)
    try:
        known, slots = _parts(manifest, parts, without)
        data, about = folder / manifest["data"], manifest["about"]
        if manifest["tokenizer"] not in (tokenizer_hash(models.base.tokenizer), vocabulary_hash(models.base.tokenizer)):
            made = manifest.get("model") or manifest["tokenizer"]
            said = f"belongs to another tokenizer, that of {made}; name it with --model"
            raise ValueError(f"{folder}: the session {said}")
        if data.is_symlink() or (data / STATE).is_symlink() or not isinstance(about, dict):
            raise ValueError(f"{folder}: {MANIFEST} is damaged, or leads elsewhere")
        keys, device = models.keys if settings.keys else None, models.base.model.device
        state = load_file(data / STATE, device=str(device))
        place, length = folder / TREE, manifest["tokens"] - state["waiting"].numel()
        if manifest["format"] == 1:
            place, length = data / TREE, None
        tree = storage.load(place, models.gistnet, models.base, device=device, keys=keys, length=length)
        if tree.rows != 1:
            raise ValueError(f"{folder}: its tree has {tree.rows} rows, a session has 1")
        stream = Stream(models, settings, tree=tree, observers=observers)
        if known:
            _open_parts(stream, folder, known, slots)
        # Settings that are younger than the session are at their defaults.
        before = {n: v for n, v in (Settings().as_dict() | manifest["settings"]).items() if n not in HOW}
        same = before == json.loads(json.dumps(settings.of_window()))
        same &= _same_parts(stream, manifest.get("parts", []))
        _restore(stream, state, same)
        if int(stream.lengths[0]) != manifest["tokens"]:
            raise ValueError(f"{folder}: {int(stream.lengths[0])} tokens are there, {manifest['tokens']} were saved")
    except (KeyError, TypeError, IndexError, AttributeError, RuntimeError, OSError, SafetensorError) as error:
        raise ValueError(f"{folder}: the session is damaged ({type(error).__name__}: {error})") from error
    _remove_all_but(folder, data)
    return stream, about, same


def _parts(manifest: dict, parts: list[Wanted], without: list[str]) -> tuple[list[Wanted], dict[str, int]]:
    """The parts that a session is opened with, and the slots of those that it had."""
    names = ("name", "path", "share", "pinned")
    saved = manifest.get("parts", [])
    known = {
        part["name"]: Wanted(**{n: place_of(part[n]) if n == "path" else part[n] for n in names}) for part in saved
    }
    for name in without:
        if name not in known:
            raise ValueError(f"part {name}: the session has none of this name, there is {', '.join(known) or 'none'}")
        del known[name]
    known |= {part.name: part for part in parts}
    return [*known.values()], {part["name"]: part["slot"] for part in saved}


def _open_parts(stream: Stream, folder: Path, known: list[Wanted], slots: dict[str, int]) -> None:
    try:
        stream.use(known, slots)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}; --drop NAME opens the session without a part") from error


def _same_parts(stream: Stream, saved: list[dict]) -> bool:
    """Whether the parts are as they were, so that the window may come back."""
    there = [(part.name, part.wanted.share, part.version, slot) for slot, part in stream.parts.items()]
    return sorted(there) == sorted((p["name"], p["share"], p["version"], p["slot"]) for p in saved)


def is_session(folder: Path) -> bool:
    """Whether a session was saved there."""
    return (folder / MANIFEST).is_file()


def _state(stream: Stream) -> dict[str, Tensor]:
    moved = stream.rebase.moved[0] if stream.rebase.moved else None
    state = {
        "waiting": stream.waiting[0, : int(stream.counts[0])],
        "refocuses": torch.tensor(stream.refocuses),
        "since": torch.tensor(stream.since),
        "moved": torch.tensor([] if moved is None else moved, dtype=torch.long),
    }
    if stream.context is not None:
        state |= {name: getattr(stream.context, name)[0, : int(stream.context.counts[0])] for name in WINDOW}
    return state | {f"allocator.{name}": value for name, value in stream.focus.allocator.state_dict().items()}


def _restore(stream: Stream, state: dict[str, Tensor], same: bool) -> None:
    waiting = state["waiting"].long()
    if waiting.ndim != 1 or len(waiting) > stream.block:
        raise ValueError(f"{STATE} is damaged: {list(waiting.shape)} waiting tokens, at most {stream.block} are right")
    stream.tree.check_ids(waiting)
    stream.waiting[0, : len(waiting)] = waiting
    stream.counts = torch.tensor([len(waiting)])
    if not same:
        return
    stream.refocuses, stream.since = int(state["refocuses"]), int(state.get("since", 0))
    moved = state["moved"].tolist()
    stream.rebase.moved = [tuple(moved) if len(moved) == 2 else None]
    own = {name.partition(".")[2]: value for name, value in state.items() if name.startswith("allocator.")}
    stream.focus.allocator.load_state_dict(own)
    if "lod" in state:
        entries = [state[name].long()[None] for name in WINDOW]
        if (
            stream.seen.compacted
            and not stream.seen.usable(torch.zeros_like(entries[0][0]), *(e[0] for e in entries)).all()
        ):
            return  # what the window shows was taken away meanwhile: it is put together anew
        budget = stream.settings.budget
        stream.restore(WorkingContext(stream.seen, *entries, torch.tensor([entries[0].shape[1]]), budget))


def _manifest(folder: Path) -> dict:
    path = folder / MANIFEST
    if not folder.is_dir() or path.is_symlink() or not path.is_file():
        raise ValueError(f"{folder}: there is no session, {MANIFEST} is missing")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version, data = manifest["format"], manifest["data"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: {MANIFEST} is damaged ({type(error).__name__}: {error})") from error
    if type(version) is not int or not isinstance(data, str) or not DATA.fullmatch(data):
        raise ValueError(f"{folder}: {MANIFEST} is damaged (format {version!r}, data {data!r})")
    if version > WITH_PARTS:
        raise ValueError(
            f"{folder}: format {version} was written by a newer program, this one reads up to {WITH_PARTS}"
        )
    return manifest
