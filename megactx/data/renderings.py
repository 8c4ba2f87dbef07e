"""Text out of installed packages: the prose of a module, its interface as JSON, tables of the standard library.

Modules are parsed, never imported.
"""

import ast
import csv
import io
import json
import re
import unicodedata
import warnings

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def parse(text: str) -> ast.Module | None:
    """The syntax tree of a module, or None where this Python cannot parse it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return ast.parse(text)
        except (SyntaxError, ValueError):
            return None


def prose(text: str, name: str) -> str:
    """The docstrings of the module ``name``, each under its qualified name as a heading.

    Text handed to an ``add_docstr`` function counts as a docstring. One-line docstrings of functions are left out: they
    are captions, not prose.
    """
    parts = []

    def visit(node, qualified):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, DOCUMENTED):
                inner = f"{qualified}.{child.name}"
                add(inner, ast.get_docstring(child), isinstance(child, ast.ClassDef))
                visit(child, inner)
            elif isinstance(child, ast.Expr) and isinstance(child.value, ast.Call):
                call = child.value
                if "add_docstr" in ast.unparse(call.func) and len(call.args) > 1:
                    text = next((n.value for n in ast.walk(call.args[1]) if _is_text(n)), None)
                    add(ast.unparse(call.args[0]), text, False)

    def add(heading, docstring, always):
        if docstring and (always or "\n" in docstring.strip()):
            parts.append(f"## {heading}\n\n{docstring.strip()}")

    if (tree := parse(text)) is None:
        return ""
    if docstring := ast.get_docstring(tree):
        parts.append(docstring)
    visit(tree, name)
    return f"# {name}\n\n" + "\n\n".join(parts) if parts else ""


def topics(text: str) -> list[str]:
    """The entries of a module that is one dict of texts, such as ``pydoc_data/topics.py``, each under its key."""
    tree = parse(text)
    found = (
        []
        if tree is None
        else [n.value for n in tree.body if isinstance(n, ast.Assign) and isinstance(n.value, ast.Dict)]
    )
    pairs = [
        (key.value, value.value)
        for node in found
        for key, value in zip(node.keys, node.values, strict=True)
        if _is_text(value)
    ]
    return [f"# {key}\n\n{value.strip()}" for key, value in sorted(pairs)]


def interface(text: str, name: str) -> str:
    """The classes and functions of the module ``name`` as JSON: fields, defaults, parameters, return types."""
    tree = parse(text)
    members = [] if tree is None else [entry for node in tree.body if (entry := _entry(node))]
    text = json.dumps({"module": name, "members": members}, indent=1)
    # One field or parameter per line, instead of one line for its every key.
    return re.sub(r"\{\s[^{}\[\]]*\}", lambda leaf: re.sub(r"\n\s*", " ", leaf[0]), text) if members else ""


def _entry(node) -> dict | None:
    if isinstance(node, ast.ClassDef):
        members = [entry for child in node.body if (entry := _entry(child))]
        return {"class": node.name, "bases": [ast.unparse(base) for base in node.bases], "members": members}
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        a = node.args
        positional = a.posonlyargs + a.args
        defaults = [None] * (len(positional) - len(a.defaults)) + a.defaults + a.kw_defaults
        parameters = [
            _named(arg.arg, arg.annotation, default)
            for arg, default in zip(positional + a.kwonlyargs, defaults, strict=True)
        ]
        entry = {"function": node.name, "parameters": [p for p in parameters if p["name"] not in ("self", "cls")]}
        return entry | ({"returns": ast.unparse(node.returns)} if node.returns else {})
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return _named(node.target.id, node.annotation, node.value)
    if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
        return _named(node.targets[0].id, None, node.value)
    return None


def _named(name, annotation, default) -> dict:
    entry = {"name": name}
    if annotation is not None:
        entry["type"] = ast.unparse(annotation)
    if default is not None:
        entry["default"] = _json_value(default)
    return entry


def _json_value(node):
    try:
        value = ast.literal_eval(node)
        json.dumps(value)
        return value
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return ast.unparse(node)


def _is_text(node) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" in node.value


def listing(record: str) -> str:
    """The ``RECORD`` of an installed package as CSV of path and size: sources only, without the hashes."""
    rows = [row for row in csv.reader(io.StringIO(record)) if len(row) == 3 and row[0].endswith(".py")]
    return _csv([("path", "bytes"), *sorted((path, size) for path, _, size in rows)])


def tables() -> list[tuple[str, str]]:
    """-> (name, text) of tables that the standard library holds as data: characters, opcodes, status codes."""
    import http
    import opcode
    import pickletools

    found = [
        ("opcode.json", json.dumps({name: opcode.opmap[name] for name in sorted(opcode.opmap)}, indent=1)),
        (
            "pickletools.json",
            json.dumps(
                [
                    {
                        "name": op.name,
                        "code": f"0x{ord(op.code):02x}",
                        "argument": op.arg and op.arg.name,
                        "before": [kind.name for kind in op.stack_before],
                        "after": [kind.name for kind in op.stack_after],
                        "protocol": op.proto,
                    }
                    for op in pickletools.opcodes
                ],
                indent=1,
            ),
        ),
        (
            "http.csv",
            _csv(
                [("code", "name", "phrase", "description")]
                + [(s.value, s.name, s.phrase, s.description) for s in http.HTTPStatus]
            ),
        ),
    ]
    for page in range(0x20000 // 512):
        rows = [row for code in range(page * 512, page * 512 + 512) if (row := _character(chr(code)))]
        if rows:
            header = ("code", "name", "category", "bidirectional", "decomposition", "numeric")
            found.append((f"unicodedata/{page * 512:05x}.csv", _csv([header, *rows])))
    return found


def _character(c: str) -> tuple | None:
    name = unicodedata.name(c, "")
    # The names of these are the code point again.
    if not name or name.startswith(("CJK ", "HANGUL SYLLABLE", "TANGUT ", "NUSHU ", "KHITAN ")):
        return None
    numeric = unicodedata.numeric(c, "")
    decomposition = unicodedata.decomposition(c)
    return f"{ord(c):04X}", name, unicodedata.category(c), unicodedata.bidirectional(c), decomposition, numeric


def _csv(rows) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()
