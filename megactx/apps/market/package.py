"""A package: a tree, what is said of it, and its author's signature, in one uncompressed tar. Never code.

    package.json      the card: name, version, licence, model identity, sources, samples, and the checksum of each file
    package.sig       the author's public key and signature (Ed25519) of the bytes of package.json
    manifest.json     with the database what ``memory.storage`` opens: an installed package is a tree's folder
    pages-....db

What curation took away from the tree, and the log of that, stay at home. A package is checked the same way before it is
signed, when it comes to the catalogue and before it is installed.
"""

import hashlib
import io
import json
import os
import re
import sqlite3
import tarfile
from collections.abc import Iterable
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megactx.framework.files import checksum, replacing
from megactx.memory import storage
from megactx.memory.curation import Curated
from megactx.memory.page_file import PARTS, TABLES, PageFile
from megactx.memory.pages import SIGNALS

FORMAT = 1
CARD, SIGNATURE = "package.json", "package.sig"
NAME = r"[a-z0-9][a-z0-9-]{1,62}"
LARGEST_CARD = 2**22  # bytes
SAMPLES, SAMPLE = 5, 400  # blocks that are shown, and characters of each
REMEDY = "name another place"


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Source(_Form):
    """A part of the tree: its first token, its tokens, and a hash of their ids."""

    name: str = Field(max_length=500)
    start: int = Field(ge=0)
    tokens: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Sample(_Form):
    """A block as a text."""

    start: int = Field(ge=0)
    text: str = Field(max_length=SAMPLE)


class Model(_Form):
    """What the tree needs: identities as ``memory.description`` writes them, and that of the tokenizer."""

    embeddings: str | None = Field(max_length=64)
    layers: str | None = Field(max_length=64)
    gistnet: str | None = Field(max_length=64)
    tokenizer: str = Field(max_length=64)
    width: int = Field(ge=1)
    block_size: int = Field(ge=2)


class File(_Form):
    """Of the package."""

    name: str = Field(pattern=r"^(manifest\.json|pages-[0-9a-f]{16}\.db)$")
    bytes: int = Field(ge=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Card(_Form):
    """What is said of a package, and signed."""

    format: int = Field(ge=1, le=FORMAT)
    name: str = Field(pattern=f"^{NAME}$")
    version: int = Field(ge=1, le=10**6)
    licence: str = Field(max_length=200)
    description: str = Field(max_length=4000)
    provenance: str = Field(max_length=4000)
    model: Model
    tokens: int = Field(ge=1)
    sources: list[Source] = Field(min_length=1, max_length=10_000)
    samples: list[Sample] = Field(max_length=SAMPLES)
    files: list[File] = Field(min_length=2, max_length=2)


def licence_of(text: str) -> str:
    """An SPDX expression in its usual form; one of one's own is ``LicenseRef-NAME``.

    Raises:
        ValueError: it is none.
    """
    try:
        return str(canonicalize_license_expression(text))
    except InvalidLicenseExpression as error:
        raise ValueError(f"licence={text!r} is no SPDX licence, such as CC-BY-4.0 or LicenseRef-NAME") from error


def key_of(path: Path) -> Ed25519PrivateKey:
    """The author's key, made where there is none, for its owner alone.

    Raises:
        ValueError: the file holds no such key.
    """
    if not path.exists():
        key, umask = Ed25519PrivateKey.generate(), os.umask(0o077)
        try:
            with replacing(path, REMEDY) as part:
                part.write_bytes(
                    key.private_bytes(
                        serialization.Encoding.PEM,
                        serialization.PrivateFormat.PKCS8,
                        serialization.NoEncryption(),
                    )
                )
        finally:
            os.umask(umask)
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: it is no key ({error})") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError(f"{path}: it is no Ed25519 key")
    return key


def public_of(key: Ed25519PrivateKey) -> str:
    """64 hex digits."""
    return key.public_key().public_bytes_raw().hex()


def tree_files(tree: Curated, folder: Path) -> list[File]:
    """Copy a tree, without its archive, log and signals, into a folder as it will be in the package."""
    path = folder / f"pages-{os.urandom(8).hex()}.db"
    file = PageFile(path, new=True)
    tree.file.db.execute("BEGIN")  # one state, whoever writes meanwhile
    try:
        about = {
            name: value for name, value in tree.file.about("tree").items() if name not in ("commit", "epoch", "signals")
        }
        with file.step():
            pages = tree.file.db.execute("SELECT * FROM page WHERE (id >> 48) & 255 < ?", (PARTS.index(SIGNALS),))
            file.db.executemany("INSERT INTO page VALUES (?, ?, ?, ?)", pages)
            file.say("tree", about | {"commit": 0, "epoch": 0})
    finally:
        tree.file.db.execute("COMMIT")
    file.publish()
    file.close()
    for end in ("-wal", "-shm"):
        path.with_name(path.name + end).unlink(missing_ok=True)
    manifest = folder / storage.MANIFEST
    manifest.write_text(json.dumps({"format": storage.FORMAT, "data": path.name}, indent=1) + "\n")
    return [File(name=p.name, bytes=p.stat().st_size, sha256=checksum(p)) for p in (manifest, path)]


def write(path: Path, card: Card, folder: Path, key: Ed25519PrivateKey) -> None:
    """Sign a card, and write it with the files of ``folder`` into one file.

    Raises:
        ValueError: the files are not what the card says, or nothing may be written there.
        RunFailed: the disk is full.
    """
    check_tree(folder, card)
    said = (json.dumps(card.model_dump(), indent=1) + "\n").encode()
    signed = json.dumps({"key": public_of(key), "signature": key.sign(said).hex()}).encode()
    with replacing(path, REMEDY) as part, tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in ((CARD, said), (SIGNATURE, signed)):
            tar.addfile(_member(name, len(content)), io.BytesIO(content))
        for file in card.files:
            with (folder / file.name).open("rb") as content:
                tar.addfile(_member(file.name, file.bytes), content)


def unpack(path: Path, folder: Path) -> tuple[Card, str]:
    """Check a package and put its files into an empty folder; -> the card, and the key that signed it.

    Raises:
        ValueError: what is wrong with it.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            said, signed = (_small(tar, name) for name in (CARD, SIGNATURE))
            card, key = _checked(said, signed)
            for file in card.files:
                _copy(tar, file, folder / file.name)
            if tar.next() is not None:
                raise ValueError("it holds more than its card says")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"it is no package, or was cut ({error})") from error
    (folder / CARD).write_bytes(said)
    (folder / SIGNATURE).write_bytes(signed)
    check_tree(folder, card)
    return card, key


def installed(folder: Path) -> tuple[Card, str]:
    """The card of an installed package, and who signed it.

    Raises:
        ValueError: there is none.
    """
    try:
        return _checked((folder / CARD).read_bytes(), (folder / SIGNATURE).read_bytes())
    except OSError as error:
        raise ValueError(f"{folder}: no package is installed there") from error


def check_tree(folder: Path, card: Card) -> None:
    """Whether the tree in a folder is whole, is plain data and is the one that a card speaks of.

    Raises:
        ValueError: it is not.
    """
    manifest = storage.read_manifest(folder)
    names = {file.name for file in card.files}
    if manifest.keys() != {"format", "data"} or manifest["format"] != storage.FORMAT:
        raise ValueError("its manifest is not that of a tree")
    if names != {storage.MANIFEST, manifest["data"]}:
        raise ValueError("its manifest names another file than its card")
    path = storage.database(folder, manifest["data"])
    _check_schema(path)
    file = PageFile(path)
    try:
        about = file.about("tree")
        _check_about(about, card)
        _check_pages(file, about)
    except (KeyError, TypeError, AttributeError, IndexError, RecursionError, sqlite3.Error) as error:
        raise ValueError(f"its tree is damaged ({type(error).__name__}: {error})") from error
    finally:
        file.close()
        for end in ("-wal", "-shm"):
            path.with_name(path.name + end).unlink(missing_ok=True)


def differences(old: Iterable[dict], new: Iterable[dict]) -> dict[str, list[str]]:
    """What sources came, went and changed between two versions, by their names."""
    before, after = _named(old), _named(new)
    return {
        "came": sorted(after.keys() - before.keys()),
        "went": sorted(before.keys() - after.keys()),
        "changed": sorted(name for name in after.keys() & before.keys() if after[name] != before[name]),
    }


def _named(sources: Iterable[dict]) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    for source in sources:
        out.setdefault(source["name"], []).append(source["sha256"])
    return out


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size = size
    return member


def _next(tar: tarfile.TarFile, name: str) -> tarfile.TarInfo:
    member = tar.next()
    if member is None or member.name != name or not member.isreg() or member.issparse():
        raise ValueError(f"{name} is not where it should be in it")
    return member


def _small(tar: tarfile.TarFile, name: str) -> bytes:
    member = _next(tar, name)
    if member.size > LARGEST_CARD:
        raise ValueError(f"its {name} is larger than {LARGEST_CARD:,} bytes")
    return tar.extractfile(member).read()


def _copy(tar: tarfile.TarFile, file: File, path: Path) -> None:
    member = _next(tar, file.name)
    if member.size != file.bytes:
        raise ValueError(f"{file.name} has {member.size:,} bytes, its card says {file.bytes:,}")
    digest, content = hashlib.sha256(), tar.extractfile(member)
    with path.open("xb") as out:
        while piece := content.read(2**20):
            digest.update(piece)
            out.write(piece)
    if digest.hexdigest() != file.sha256:
        raise ValueError(f"{file.name} is damaged: its checksum is not that of its card")


def _checked(said: bytes, signed: bytes) -> tuple[Card, str]:
    try:
        found = json.loads(signed)
        key, signature = found["key"], bytes.fromhex(found["signature"])
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(signature, said)
    except InvalidSignature as error:
        raise ValueError("its signature is not of this card: it was changed after it was signed") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"its signature cannot be read ({type(error).__name__})") from error
    try:
        card = Card.model_validate_json(said)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"its card is wrong: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    if licence_of(card.licence) != card.licence:
        raise ValueError(f"its licence={card.licence!r} is not in its usual form")
    ends = [0, *(source.start + source.tokens for source in card.sources)]
    if [source.start for source in card.sources] != ends[:-1] or ends[-1] != card.tokens:
        raise ValueError("its sources do not follow each other up to its last token")
    return card, bytes.fromhex(key).hex()


def _check_schema(path: Path) -> None:
    """Four plain tables and nothing that SQLite would run: no view, trigger, index or virtual table."""
    try:
        db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)
        try:
            db.execute("PRAGMA trusted_schema=OFF")
            db.execute("PRAGMA cell_size_check=ON")
            found = {(kind, name, re.sub(r"\s+", " ", sql or "")) for kind, name, sql in db.execute(
                "SELECT type, name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_autoindex_%'"
            )}  # fmt: skip
            if found != {("table", name, f"CREATE TABLE {name} ({columns})") for name, columns in TABLES.items()}:
                raise ValueError("its database holds other tables than a tree's")
            if db.execute("SELECT COUNT(*) FROM archive").fetchone()[0]:
                raise ValueError("its database holds what was taken away from the tree")
            if [name for (name,) in db.execute("SELECT name FROM about LIMIT 2")] != ["tree"]:
                raise ValueError("its database says more than what tree it holds")
            size = db.execute("SELECT LENGTH(CAST(value AS BLOB)) FROM about").fetchone()[0]
            if size > LARGEST_CARD:
                raise ValueError(f"its database says more than {LARGEST_CARD:,} bytes of the tree")
        finally:
            db.close()
    except sqlite3.Error as error:
        raise ValueError(f"its database is damaged ({error})") from error


def model_of(about: dict, tokenizer: str) -> Model:
    """What a tree's description says that it needs."""
    return Model(
        embeddings=about["model"],
        layers=about.get("layers"),
        gistnet=about["versions"][about["version"]],
        tokenizer=tokenizer,
        width=about["width"],
        block_size=about["block_size"],
    )


def _check_about(about: dict, card: Card) -> None:
    if model_of(about, card.model.tokenizer) != card.model:
        raise ValueError("its tree is of another model than its card says")
    if about["lengths"] != [card.tokens]:
        raise ValueError("its tree has another length than its card says")


def _check_pages(file: PageFile, about: dict) -> None:
    """As many pages as the lengths say, each with its checksum."""
    sizes, (length,) = about["page_sizes"], about["lengths"]
    if not isinstance(sizes, list) or len(sizes) > 16 or not all(type(s) is int and 0 < s <= 2**20 for s in sizes):
        raise ValueError("its tree's pages have no sizes")
    count = 0
    for lod, size in enumerate(sizes):
        pages = -(-(length // about["block_size"] ** lod) // size)
        for part in PARTS[: 1 if lod == 0 else 3 if lod == 1 and about.get("keys") else 2]:
            numbers = file.numbers(lod, part)
            if len(numbers) != pages or numbers != list(range(pages)):
                raise ValueError(f"its tree's level {lod} has {len(numbers)} pages of {part}, {pages} are needed")
            count += pages
            for number in numbers:
                file.get(lod, part, number)
    if file.db.execute("SELECT COUNT(*) FROM page").fetchone()[0] != count:
        raise ValueError("its database holds pages that are not the tree's")
