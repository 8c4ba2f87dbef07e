"""Every command that the README and the experiments show can be run as written."""

import re
import runpy
import shlex
from functools import cache
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from megactx.framework.config.search_path import VERSION_BASE, compose, reference, register, root
from megactx.framework.config.validate import validate

REPOSITORY = Path(__file__).parents[1]
EXPERIMENTS = sorted((REPOSITORY / "conf" / "experiment").glob("*.yaml"))
COMMAND = re.compile(r"^[#$>\s`]*(?:\S*/)?python train\.py(.*?)`*$")


MOVED = ("demo", "training", "hosts", "memory", "sessions")
PAGES = [REPOSITORY / "README.md", *(REPOSITORY / "docs" / f"{name}.md" for name in MOVED)]


def commands(path: Path) -> list[str]:
    if not path.exists():
        return []
    text = path.read_text().replace("\\\n", " ")
    return [match[1].strip() for line in text.splitlines() if (match := COMMAND.match(line))]


FOUND = [
    (path.name, command)
    for path in (*PAGES, REPOSITORY / "docs" / "own_model.md", *EXPERIMENTS)
    for command in commands(path)
]


def jobs(arguments: list[str]) -> list[list[str]]:
    """The override lists of the jobs of a command line: one, or with -m as many as it sweeps over."""
    flags = [argument for argument in arguments if argument.startswith("-")]
    overrides = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
    if not {"-m", "--multirun"} & {*flags}:
        return [overrides]
    import hydra
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    register()
    with hydra.initialize_config_dir(str(root("configs")), version_base=VERSION_BASE):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        (batch,) = BasicSweeper.split_arguments(parser.parse_overrides(overrides), max_batch_size=None)
    return batch


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_says_at_its_head_how_to_run_it(path):
    package, how = path.read_text().splitlines()[:2]
    assert package == "# @package _global_"  # Hydra reads it only from the first line
    assert how.startswith((f"# python train.py experiment={path.stem}", "# python -m megactx.stages.retrofit "))


def test_the_readme_shows_commands():
    assert commands(REPOSITORY / "README.md")


@pytest.mark.parametrize(("source", "command"), FOUND, ids=[" ".join(pair) for pair in FOUND])
def test_a_command_composes_and_is_valid(source, command):
    found, seen = jobs(shlex.split(command, comments=True)), set()
    while True:
        overrides = max(found, key=lambda job: len({*job} - seen))
        composes(*overrides)
        seen |= {*overrides}
        if all(seen >= {*job} for job in found):
            break  # every value of a sweep once, not every pair


@cache
def composes(*overrides):
    cfg = compose(overrides, with_hydra=True)
    choices = cfg.hydra.runtime.choices
    OmegaConf.set_struct(cfg, False)
    del cfg["hydra"]
    cfg.name, cfg.folder = "run", "runs/run"
    validate(cfg, reference(choices, cfg))


def test_a_sweep_over_all_experiments_finds_them_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = jobs(["-m", "experiment=glob(*)", "seed=0,1"])
    assert len(found) == 2 * len(EXPERIMENTS)
    assert ["experiment=base_lm", "seed=1"] in found


PRINTED = {
    "In your own code": "torch.Size([1, 1, 2, 32, 8192])",
    "A history as a tree": "torch.Size([1, 8192])",
    "Detail where it pays": "Refocus(expands=tensor([0])",
}


def python_of_the_readme() -> dict[str, str]:
    """Heading -> code of the sections that use the package."""
    sections = re.split(r"^##+ ", "\n".join(p.read_text(encoding="utf-8") for p in PAGES), flags=re.MULTILINE)
    found = {text.partition("\n")[0]: re.search(r"```python\n(.*?)```", text, re.DOTALL) for text in sections}
    return {heading: code[1] for heading, code in found.items() if code and "from megactx import" in code[1]}


@pytest.mark.parametrize("heading", PRINTED)
def test_the_python_of_the_readme_runs_as_written(heading, capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    exec(compile(python_of_the_readme()[heading], "README.md", "exec"), {})
    assert PRINTED[heading] in capsys.readouterr().out


def test_all_python_of_the_readme_is_run_and_a_text_takes_ten_lines_to_its_logits():
    code = python_of_the_readme()
    assert {*code} == {*PRINTED}
    assert sum(bool(line) for line in code["A history as a tree"].splitlines()) == 10


@pytest.mark.parametrize("name", ["causal", "encode", "end_to_end", "focus", "ingest", "runtime", "substitution"])
def test_a_benchmark_tells_a_mistake_in_one_line(name, monkeypatch, capsys):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # it would hold for the tests that follow
    main = runpy.run_path(str(REPOSITORY / "benchmarks" / f"{name}.py"))["main"]
    assert main(["--model" if name == "runtime" else "--base", "/no/such"]) == 2
    (message,) = capsys.readouterr().err.strip().splitlines()
    assert message.startswith("megactx: ") and "/no/such" in message
