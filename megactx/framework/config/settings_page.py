"""``docs/settings.md``: every config group, its options, and every setting with its default and its comment.

python -m megactx.framework.config.settings_page > docs/settings.md
python -m megactx.framework.config.settings_page --check
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path

from .config_docs import Option, Setting, chosen, groups, read
from .search_path import root

COMMAND = "python -m megactx.framework.config.settings_page > docs/settings.md"
HEAD = f"""# Settings

Generated from the config files by `{COMMAND}`.

A run is one option of every group, `python train.py GROUP=OPTION`, and any setting can be set directly, `KEY=VALUE`. An
experiment chooses options and sets values; the command line has the last word. `${{...}}` is made of other settings;
one that only hands another through is left out. `null` is no value.
"""


def page() -> str:
    """The page as Markdown."""
    found, default = groups(), chosen()
    parts = [HEAD, "## Every run\n", _table(_top()), "## Groups\n", _overview(found, default)]
    for group, options in found.items():
        parts.append(f"## {group}\n")
        for option in options:
            parts.append(f"### {group}={option.name}{' (default)' if option.name in default.get(group, ()) else ''}\n")
            parts += _about(option)
            if option.settings:
                parts.append(_table(option.settings))
    return "\n".join(parts)


def _top() -> list[Setting]:
    return [s for s in read(root("configs") / "config.yaml").settings if s.key.partition(".")[0] != "hydra"]


def _overview(found: dict[str, list[Option]], default: dict) -> str:
    rows = []
    for group, options in found.items():
        names = (f"**{o.name}**" if o.name in default.get(group, ()) else o.name for o in options)
        rows.append(f"| [{group}](#{group.replace('/', '')}) | {', '.join(names)} |")
    return "\n".join(["| group | options, the default in bold |", "|---|---|", *rows, ""])


def _about(option: Option) -> list[str]:
    lines = []
    if option.about:
        lines.append(f"{option.about}\n")
    if option.run:
        lines.append(f"    {option.run}\n")
    if option.defaults:
        lines.append(f"Takes {', '.join(f'`{name}`' for name in option.defaults)}.\n")
    return lines


def _table(settings: list[Setting]) -> str:
    lines = ["| setting | value | |", "|---|---|---|"]
    for setting in settings:
        handed = re.fullmatch(r"\$\{[\w.]+\}", setting.value)  # it stands where it is set
        if not handed and (setting.value or setting.comment):  # else it only opens a mapping
            shown = f"`{_cell(setting.value)}`" if setting.value else ""
            lines.append(f"| `{setting.key}` | {shown} | {_cell(setting.comment)} |")
    return "\n".join([*lines, ""])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main(
    arguments: list[str], made: Callable[[], str] = page, name: str = "settings.md", command: str = COMMAND
) -> int:
    """Print a page of docs, or with ``--check`` compare it with its file; -> exit code."""
    if arguments != ["--check"]:
        print(made(), end="")
        return 0
    path = Path(__file__).resolve().parents[3] / "docs" / name
    if path.exists() and path.read_text(encoding="utf-8") == made():
        return 0
    print(f"docs/{name} is not current; run: {command}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
