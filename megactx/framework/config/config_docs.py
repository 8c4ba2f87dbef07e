"""What there is to choose, read from the config files themselves: groups, options, settings, and their comments.

Lines are parsed, not only YAML, because the comments say what a setting means. Nothing heavy is imported: ``--help``
answers at once.
"""

import re
import string
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from omegaconf import OmegaConf

Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
KEY = re.compile(r"^( *)([^\s#:\-][^:]*?):(?:\s+(.*))?$")


@dataclass
class Setting:
    """One line of a config file: a dotted key, its value as written (empty where a mapping opens), its comment."""

    key: str
    value: str
    comment: str


@dataclass
class Option:
    """A config file: the option ``name`` of ``group``.

    ``about`` is its first comment, ``run`` the command that it shows, ``defaults`` what its defaults list names.
    """

    group: str
    name: str
    about: str = ""
    run: str = ""
    defaults: list[str] = field(default_factory=list)
    settings: list[Setting] = field(default_factory=list)


def root(name: str) -> Path:
    """The folder of a config root, ``configs`` or ``conf``: in the wheel below ``_conf``, else beside the package."""
    package = Path(__file__).resolve().parents[2]
    packed = package / "_conf" / name
    return packed if packed.is_dir() else package.parent / name


def groups() -> dict[str, list[Option]]:
    """group -> its options, by name; the experiments last."""
    found = {}
    for base in (root("configs"), root("conf")):
        for path in sorted(base.rglob("*.yaml")):
            if group := path.parent.relative_to(base).as_posix().strip("."):
                found.setdefault(group, []).append(read(path, group))
    return found


def chosen(name: str = "config") -> dict[str, list[str]]:
    """group -> the options that a file of ``configs`` takes: one, none, or several; nothing where there is none."""
    path = root("configs") / f"{name}.yaml"
    entries = yaml.load(path.read_text(encoding="utf-8"), Loader).get("defaults", []) if path.is_file() else []
    found = [pair for entry in entries if isinstance(entry, dict) for pair in entry.items()]
    return {group.lstrip("/"): [taken] if isinstance(taken, str) else taken or [] for group, taken in found}


def read(path: Path, group: str = "") -> Option:
    """Parse one config file. Settings carry the keys that they have in the composed config."""
    lines = path.read_text(encoding="utf-8").splitlines()
    option, package = Option(group, path.stem), group.replace("/", ".")
    head = 0
    about = []
    while head < len(lines) and lines[head].startswith("#"):
        text = lines[head].lstrip("# ").rstrip()
        if text.startswith("@package"):
            package = text.split()[1].replace("_global_", "")
        elif text.startswith("python train.py"):
            option.run = text
        else:
            about.append(text)
        head += 1
    option.about = " ".join(about)
    option.defaults = _defaults(yaml.load("\n".join(lines), Loader))
    option.settings = [s for s in _settings(lines[head:], package) if s.key.split(".")[-1] != "defaults"]
    return option


def _defaults(content) -> list[str]:
    found = []
    for entry in (content or {}).get("defaults", []):
        if isinstance(entry, str):
            found += [entry.partition("@")[0]] if entry != "_self_" else []
        else:
            found += [f"{str(group).removeprefix('override ').lstrip('/')}={choice}" for group, choice in entry.items()]
    return found


def _settings(lines: list[str], package: str) -> list[Setting]:
    """The settings below a package; items of a list and lines of a block of text belong to the value of their key."""
    found, path, above = [], [(-1, package)], ""
    for line in lines:
        body, comment = split_comment(line)
        if not body.strip():
            above = comment
            continue
        match = KEY.match(body)
        if match is None or (found and found[-1].value[:1] in "|>" and found[-1].value and _depth(line) > path[-1][0]):
            if found:  # else the file is an empty mapping
                found[-1].value = f"{found[-1].value} {body.strip()}".strip()
            continue
        while path[-1][0] >= len(match[1]):
            path.pop()
        parent = path[-1][1]
        key = f"{parent}.{match[2]}" if parent else match[2]
        path.append((len(match[1]), key))
        found.append(Setting(key, (match[3] or "").strip(), comment or above))
        above = ""
    return found


def _depth(line: str) -> int:
    return len(line) - len(line.lstrip())


def split_comment(line: str) -> tuple[str, str]:
    """``key: value  # comment`` -> (``key: value``, ``comment``); a # within quotes is none."""
    quote = ""
    for index, char in enumerate(line):
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'" and (index == 0 or line[index - 1] in " [{,:"):
            quote = char
        elif char == "#" and (index == 0 or line[index - 1].isspace()):
            return line[:index].rstrip(), line[index + 1 :].strip()
    return line.rstrip(), ""


def help_text() -> str:
    """What ``--help`` prints: ``hydra.help.template`` of ``config.yaml``. Hydra's own way there takes seconds."""
    template = OmegaConf.load(root("configs") / "config.yaml").hydra.help.template
    return string.Template(template).substitute()


def listing(what: str) -> str:
    """The lines of ``--help``: ``experiments``, or ``groups`` with their options. ``$`` is doubled, for Hydra."""
    found, default = groups(), chosen()
    if what == "experiments":
        lines = _table([(option.name, option.about) for option in found["experiment"]])
    else:
        lines = []
        for group, options in found.items():
            if group == "experiment":
                continue
            names = [f"{option.name}{'*' if option.name in default.get(group, ()) else ''}" for option in options]
            if any(option.about for option in options):
                lines += [group, *_table([(n, option.about) for n, option in zip(names, options, strict=True)])]
            else:
                lines.append(f"{group}: {', '.join(names)}")
    return "\n".join(lines).replace("$", "$$")


def _table(rows: list[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in rows)
    return [f"  {name:{width}}  {_first(about, 116 - width)}".rstrip() for name, about in rows]


def _first(about: str, width: int) -> str:
    """The first sentence of a comment, cut to a width."""
    return textwrap.shorten(re.split(r"(?<=[.?!]) (?=[A-Z])", about)[0], width, placeholder=" ...")
