"""``docs/methods.md``: every method that can be chosen, in one sentence of its docstring, with its paper and setting.

python -m megactx.framework.config.methods_page > docs/methods.md
python -m megactx.framework.config.methods_page --check

Files are parsed, not imported. In a docstring ``Setting: ``KEY=VALUE``.`` says what chooses the method, where that does
not follow from the name of its file.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from . import settings_page

COMMAND = "python -m megactx.framework.config.methods_page > docs/methods.md"
PACKAGE = Path(__file__).resolve().parents[2]
HEAD = f"""# Methods

Generated from the docstrings by `{COMMAND}`.

How each works stands in [method.md](method.md), all settings in [settings.md](settings.md), how to add one in
[adding.md](adding.md).
"""
# Title, what it is, where (a file or folder with a class per file, or FILE:NAME), the setting that chooses it.
SECTIONS = [
    ("Carriers", "what stands for a block", ["gist/gistnet.py", "gist/carriers"], "compressor={}"),
    (
        "Backbones of a GistNet",
        "what reads a block before it is pooled; `gistnet.type=mean` has none",
        ["gist/backbone.py", "gist/base_backbone.py"],
        "gistnet.type=transformer",
    ),
    ("Poolings of a GistNet", "from the states of a block to one vector", ["gist/poolings"], "gistnet.pooling={}"),
    ("Heads of a GistNet", "from that vector to a gist", ["gist/heads"], "gistnet.head={}"),
    ("Losses of compressors", "their weighted sum is what is learned from", ["gist/losses"], "loss.{}.weight"),
    (
        "Policies of focus",
        "what a window shows in tokens, all within the same budget",
        [
            "focus/lensnet.py",
            "memory/working_context.py:WorkingContext.recency",
            "evaluation/policies",
            "evaluation/focus.py:greedy_oracle",
        ],
        "experiment=lens",
    ),
    (
        "Policies over long texts",
        "which tokens of a long text stay for a question",
        ["evaluation/rivals"],
        "megactx.studies.ruler --policies {}",
    ),
    ("Heads of a LensNet", "from the state of an entry to its values", ["focus/heads"], "lensnet.head={}"),
    ("Allocators", "from scores to edits", ["focus/allocator.py"], "allocator=greedy"),
]


def page() -> str:
    """The page as Markdown."""
    parts = [HEAD]
    for title, about, places, setting in SECTIONS:
        parts += [f"## {title}\n", f"| name | {about} | paper | setting |", "|---|---|---|---|"]
        for name, told in methods(places):
            sentence, paper, own = described(told)
            parts.append(f"| {name} | {sentence} | {paper} | `{own or setting.format(name)}` |")
        parts.append("")
    return "\n".join(parts)


def methods(places: list[str]) -> Iterator[tuple[str, str]]:
    """(name, docstring) of each method. A file's class is called as the file in CamelCase, or ends so."""
    for place in places:
        file, _, inside = place.partition(":")
        path = PACKAGE / file
        for file in [path] if path.suffix else sorted(path.glob("[!_]*.py")):
            node = ast.parse(file.read_text(encoding="utf-8"))
            for wanted in inside.split(".") if inside else [file.stem.replace("_", "")]:
                named = [child for child in node.body if isinstance(child, ast.ClassDef | ast.FunctionDef)]
                node = next(child for child in named if child.name.lower().endswith(wanted.lower()))
            yield inside.rpartition(".")[2] or file.stem, ast.get_docstring(node) or ""


def described(docstring: str) -> tuple[str, str, str]:
    """(first sentence, link to the paper where there is an arXiv id, setting where it is said) of a docstring."""
    text = " ".join(docstring.split())
    setting = re.search(r"Setting: ``([^`]+)``", text)
    about = text.partition(" Args: ")[0]
    paper = re.search(r"(?:([A-Z][^().:]+(?:et al\.)? \d{4})[ ,(]+)?arXiv (\d{4}\.\d{5})", about)
    link = f"[{paper[1] or 'arXiv'}](https://arxiv.org/abs/{paper[2]})" if paper else ""
    plain = re.sub(r" \([^()]*arXiv [^()]*\)| \(method [^()]*\)", "", about)
    sentence = re.split(r"(?<=\.) (?=[A-Z`])", plain)[0]
    return sentence.replace("``", "`").replace("|", "\\|"), link, setting[1] if setting else ""


def main(arguments: list[str]) -> int:
    """As of ``settings_page``."""
    return settings_page.main(arguments, page, "methods.md", COMMAND)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
