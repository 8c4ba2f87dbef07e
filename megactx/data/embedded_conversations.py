"""Conversations made of what every installation has. No network, no download, and nobody has ever held them.

    docstrings   What does textwrap.dedent do?             the first paragraph of its docstring
    options      What does the option --tab of json.tool do?   what its ``--help`` says
    doctests     >>> sorted({3, 1})                        [1, 3], line by line, as an interpreter answers
    metadata     What is the package numpy?                its summary; then its licence, and what it needs

Of Python's standard library, torch and lightning; metadata of all that is installed. Several questions about
one module are turns of one conversation. They teach what a turn is, and when to stop; they are no assistant's manners.
"""

import ast
import doctest
import functools
import hashlib
import importlib.metadata
import inspect
import os
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from megactx.framework.config.types import Count

from .conversations import Conversations
from .embedded import SKIPPED_FILES, SKIPPED_FOLDERS, STANDARD_LIBRARY, Embedded, folder_of

KINDS = ("docstrings", "options", "doctests", "metadata")
PACKAGES = (STANDARD_LIBRARY, "torch", "lightning")  # the doctests of transformers show what no module prints
MARKS = {"doctests": ">>>", "options": "add_argument"}  # a module without one need not be parsed for them
TURNS = 4  # questions of one conversation at most
SHORTEST, LONGEST = 20, 600  # characters of an answer in prose
INTERPRETER = "You are a Python interpreter. Answer each input with its output alone."


class EmbeddedConversations(Conversations):
    """Conversations about the installed Python and its packages.

    Args:
        conversations: at most; a kind gives a quarter of them at most.
    """

    def __init__(self, conversations: Count = 8000):
        if conversations < 1:
            raise ValueError(f"conversations.conversations={conversations} is not allowed: 1 or more")
        self.conversations, self.versions = conversations, Embedded().versions

    def fingerprint(self) -> str:
        """Identity by the versions of all that is installed, by the settings, and by the rules of this file."""
        installed = sorted(
            (found.metadata["Name"] or "", found.version) for found in importlib.metadata.distributions()
        )
        settings = repr((sorted(self.versions.items()), installed, self.conversations)).encode()
        return hashlib.sha256(settings + Path(__file__).read_bytes()).hexdigest()[:16]

    def documents(self) -> Iterator[dict]:
        """Dicts of ``messages`` and ``source``."""
        return iter(self._found)

    @functools.cached_property
    def _found(self) -> list[dict]:
        found, each = {kind: [] for kind in KINDS}, -(-self.conversations // len(KINDS))
        found["metadata"] = list(_metadata())[:each]
        wanted = {kind for kind in KINDS if kind != "metadata"}
        for name, path in sorted(_modules(), key=lambda module: hashlib.sha256(module[0].encode()).digest()):
            wanted = {kind for kind in wanted if len(found[kind]) < each}
            if not wanted:
                break
            for kind, conversations in _of_module(name, path, wanted).items():
                found[kind] += conversations[: each - len(found[kind])]
        # A kind after the other would put like beside like; as many as were asked for, in the order of their hashes.
        every = {repr(one["messages"]): one for kind in KINDS for one in found[kind]}
        order = sorted(every, key=lambda text: hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
        return [every[text] for text in order[: self.conversations]]


def _modules() -> Iterator[tuple[str, Path]]:
    for package in PACKAGES:
        root = Path(sysconfig.get_path("stdlib") if package == STANDARD_LIBRARY else folder_of(package))
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(f for f in folders if not SKIPPED_FOLDERS.fullmatch(f) and f != "encodings")
            for name in sorted(names):
                if name.endswith(".py") and not SKIPPED_FILES.fullmatch(name):
                    path = Path(folder, name)
                    parts = path.relative_to(root).with_suffix("").parts
                    own = [] if package == STANDARD_LIBRARY else [package]
                    yield ".".join([*own, *(part for part in parts if part != "__init__")]) or package, path


def _of_module(name: str, path: Path, wanted: set[str]) -> dict[str, list[dict]]:
    """kind -> conversations about a module."""
    try:
        text = path.read_text(encoding="utf-8")
        wanted = {kind for kind in wanted if MARKS.get(kind, "") in text}
        tree = ast.parse(text if wanted else "")
    except (SyntaxError, UnicodeDecodeError, RecursionError, ValueError):
        return {}
    found = {}
    documented = list(_documented(tree, name))
    if "docstrings" in wanted:
        pairs = [(_question(node, full), _first_paragraph(text)) for node, full, text in documented]
        found["docstrings"] = _grouped([(q, a) for q, a in pairs if q and a], name)
    if "options" in wanted:
        found["options"] = _grouped(_options(tree, name), name)
    if "doctests" in wanted:
        found["doctests"] = [
            {"messages": turns, "source": full} for _, full, text in documented if (turns := _session(text))
        ]
    return found


def _documented(tree: ast.Module, name: str) -> Iterator[tuple[ast.AST, str, str]]:
    """(node, full name, docstring) of a module and of its public classes, methods and functions."""
    nodes = [(tree, name)]
    while nodes:
        node, full = nodes.pop(0)
        if text := ast.get_docstring(node):
            yield node, full, text
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef) and not child.name.startswith("_"):
                if not isinstance(node, ast.FunctionDef):
                    nodes.append((child, f"{full}.{child.name}"))


def _question(node: ast.AST, full: str) -> str:
    if isinstance(node, ast.Module):
        return f"What is in the module {full}?"
    return f"What is the class {full}?" if isinstance(node, ast.ClassDef) else f"What does {full} do?"


def _first_paragraph(text: str) -> str:
    text = " ".join(re.split(r"\n\s*\n", inspect.cleandoc(text))[0].split())
    return text if SHORTEST <= len(text) <= LONGEST and ">>>" not in text else ""


def _options(tree: ast.Module, name: str) -> list[tuple[str, str]]:
    pairs = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            names = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            told = next((k.value for k in node.keywords if k.arg == "help"), None)
            if names and isinstance(told, ast.Constant) and isinstance(told.value, str):
                text = " ".join(told.value.replace("%%", "%").split())
                what = "option" if names[-1].startswith("-") else "argument"
                if len(text) >= SHORTEST // 2 and "%(" not in text:
                    pairs.append((f"What does the {what} {names[-1]} of {name} do?", text))
    return pairs


def _session(text: str) -> list[dict]:
    """The doctests of a docstring as turns; lines without an output are asked together with the next one."""
    try:
        examples = doctest.DocTestParser().get_examples(text)
    except ValueError:  # an odd indentation
        return []
    turns, lines = [{"role": "system", "content": INTERPRETER}], []
    for example in examples:
        first, *rest = example.source.rstrip("\n").split("\n")
        lines += [f">>> {first}", *(f"... {line}".rstrip() for line in rest)]
        if example.want and not example.exc_msg and "..." not in example.want and len(example.want) <= LONGEST:
            turns += _turn("\n".join(lines), example.want.rstrip("\n"))
            lines = []
        elif example.want:
            break
        if len(turns) > 2 * TURNS:
            break
    return turns if len(turns) > 1 else []


def _metadata() -> Iterator[dict]:
    for found in sorted(importlib.metadata.distributions(), key=lambda one: one.metadata["Name"] or ""):
        about, name = found.metadata, found.metadata["Name"]
        licence = about["License-Expression"] or about["License"] or ""
        needs = sorted({re.split(r"[\s<>=!~;(\[]", need)[0] for need in found.requires or [] if "extra ==" not in need})
        facts = [
            (f"What is the Python package {name}?", about["Summary"] or ""),
            ("Which licence does it have?", licence if len(licence) < 60 else ""),
            ("Which version of Python does it need?", about["Requires-Python"] or ""),
            ("Which packages does it need?", ", ".join(needs) or "None."),
        ]
        if name and facts[0][1].strip():
            turns = [turn for question, answer in facts if answer.strip() for turn in _turn(question, answer.strip())]
            yield {"messages": turns, "source": f"metadata of {name}"}


def _grouped(pairs: list[tuple[str, str]], source: str) -> list[dict]:
    return [
        {"messages": [turn for pair in pairs[start : start + TURNS] for turn in _turn(*pair)], "source": source}
        for start in range(0, len(pairs), TURNS)
    ]


def _turn(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
