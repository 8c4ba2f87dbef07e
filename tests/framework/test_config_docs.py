"""What the config files say of themselves: read right, shown by ``--help``, completed by Tab."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from megactx.framework.app import run
from megactx.framework.config.config_docs import chosen, groups, help_text, read, split_comment
from megactx.framework.config.search_path import root

REPOSITORY = Path(__file__).parents[2]
FILES = [path for name in ("configs", "conf") for path in sorted(root(name).rglob("*.yaml"))]


def leaves(tree, prefix=""):
    for name, value in (tree or {}).items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_settings_read_line_by_line_are_those_that_yaml_reads(path):
    tree = {k: v for k, v in (OmegaConf.to_container(OmegaConf.load(path)) or {}).items() if k != "defaults"}
    option = read(path, group="")
    package = next((line.split()[-1] for line in path.read_text().splitlines() if "@package" in line), "_global_")
    prefix = "" if package == "_global_" else f"{package}."
    found = {}
    for setting in option.settings:
        if setting.value[:1] not in ("", "|", ">"):
            text = setting.value.replace(" - ", "\n- ") if setting.value.startswith("- ") else setting.value
            value = OmegaConf.to_container(OmegaConf.create(f"x: {text}" if text[:2] != "- " else f"x:\n{text}"))["x"]
            found |= {f"{prefix}{key}": v for key, v in leaves({setting.key.removeprefix(prefix): value})}
    expected = {f"{prefix}{k}": v for k, v in leaves(tree) if not (isinstance(v, str) and "\n" in v)}
    assert found == expected


def test_a_files_head_tells_what_it_is_how_to_run_it_and_where_its_settings_go(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "# @package gistnet\n"
        "# python train.py experiment=mine\n"
        "# What it is:\n"
        "# a test.\n"
        "defaults:\n"
        "  - demo\n"
        "  - override /preset: demo\n"
        "  - _self_\n"
        'head: "a # b"  # text\n'
        "deep:  # a mapping\n"
        "  # what layers are\n"
        "  layers: 3\n"
        "  list:  # of two\n"
        "    - {a: 1}\n"
        "    - {a: 2}\n"
    )
    option = read(tmp_path / "mine.yaml", "experiment")
    assert option.run == "python train.py experiment=mine" and option.about == "What it is: a test."
    assert option.defaults == ["demo", "preset=demo"]
    assert [(s.key, s.value, s.comment) for s in option.settings] == [
        ("gistnet.head", '"a # b"', "text"),
        ("gistnet.deep", "", "a mapping"),
        ("gistnet.deep.layers", "3", "what layers are"),
        ("gistnet.deep.list", "- {a: 1} - {a: 2}", "of two"),
    ]


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("a: 1  # b", ("a: 1", "b")),
        ("a: 'x # y'  # z", ("a: 'x # y'", "z")),
        ("a: it's  # b", ("a: it's", "b")),
        ("a: b#c", ("a: b#c", "")),
        ("# all", ("", "all")),
        ("", ("", "")),
    ],
)
def test_a_comment_is_told_from_a_value(line, parts):
    assert split_comment(line) == parts


def test_the_default_of_every_group_is_one_of_its_options():
    found = groups()
    for group, options in chosen().items():
        if not group.startswith("override"):
            assert set(options) <= {o.name for o in found[group]}, group


def test_help_lists_every_experiment_with_its_line_and_every_option():
    shown = help_text()
    lines = shown.splitlines()
    experiments = lines[: next(i for i, line in enumerate(lines) if line.startswith("== Groups"))]
    for option in groups()["experiment"]:
        (line,) = [line for line in experiments if line.split()[:1] == [option.name] and line.startswith("  ")]
        assert option.about[:30] in line
    for group, options in groups().items():
        if group != "experiment":
            assert all(option.name in shown for option in options), group
    assert max(map(len, lines)) <= 120 and "default*" in shown and "$$" not in shown and "${" not in shown


def test_hydras_own_help_and_ours_are_one(capsys):
    import hydra

    from megactx.framework import app

    assert run(["--help"]) == 0
    ours = capsys.readouterr().out
    before, sys.argv = sys.argv, ["train.py", "--help"]
    try:
        app.main()
    except SystemExit:
        pass
    finally:
        sys.argv = before
        hydra.core.global_hydra.GlobalHydra.instance().clear()
    assert capsys.readouterr().out.strip() == ours.strip()


def completed(line: str, tmp_path) -> list[str]:
    environment = {**os.environ, "COMP_LINE": line, "COMP_POINT": str(len(line)), "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, str(REPOSITORY / "train.py"), "-sc", "query=bash"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "among"),
    [
        ("python train.py exp", ["experiment="]),
        ("python train.py experiment=gist_", ["experiment=gist_stage1", "experiment=gist_stage2"]),
        ("python train.py experiment=demo debug=", ["debug=fdr", "debug=limit", "debug=overfit", "debug=profiler"]),
        ("python train.py experiment=gist_stage2 gistnet.h", ["gistnet.head="]),
    ],
)
def test_tab_completes_groups_options_of_both_roots_and_settings(line, among, tmp_path):
    offered = completed(line, tmp_path)
    assert set(among) <= set(offered)
    assert all(word.startswith(line.split()[-1]) for word in offered)
    assert list(tmp_path.iterdir()) == []


def test_the_completion_script_is_for_bash(tmp_path):
    command = [sys.executable, str(REPOSITORY / "train.py"), "-sc", "install=bash"]
    script = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0 and "complete -o nospace" in script
