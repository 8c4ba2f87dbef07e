"""The notebooks run as they are, and what is committed of them reads well."""

import json
import re
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def outputs(notebook) -> list:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def kinds(notebook) -> list[set[str]]:
    """The kinds of output of each cell; a stream may come in several parts."""
    return [{output.output_type for output in cell.get("outputs", ())} for cell in notebook.cells]


def streams(notebook) -> dict[str, str]:
    """What was printed, by stream."""
    found = {"stdout": "", "stderr": ""}
    for output in outputs(notebook):
        if output.output_type == "stream":
            found[output.name] += output.text
    return found


def trained_gist_is_above_the_last_token(said: str) -> None:
    recovery = [float(value) for value in re.findall(r"^gist .*recovery +(-?[\d.]+)$", said, re.MULTILINE)]
    token = [float(value) for value in re.findall(r"^last token .*recovery +(-?[\d.]+)$", said, re.MULTILINE)]
    assert len(recovery) == len(token) == 2
    assert recovery[0] == token[0] and recovery[1] > token[1]


def edits_count_and_nothing_is_lost_on_the_way_to_the_disk(said: str) -> None:
    assert said.count("refused: ") == 3 and "nothing has changed: True" in said
    gist, raw = (float(value) for value in re.findall(r"^the sentence is .* = ([\d.]+)$", said, re.MULTILINE))
    assert gist < 0.1 < 0.4 < raw
    assert "the same logits after loading: True" in said


def measured_values_find_the_block_that_is_needed(said: str) -> None:
    full, cold = map(
        float, re.search(r"^NLL of what follows: ([\d.]+) .* ([\d.]+) after this window$", said, re.M).groups()
    )
    block, value = re.search(r"^expand block +(\d+) +\+([\d.]+) nats", said, re.MULTILINE).groups()
    assert block in ("19", "20", "21") and float(value) > 0.5
    end = float(re.search(r"^NLL ([\d.]+) at the end", said, re.MULTILINE).group(1))
    assert end < cold - 1 and end < full + 0.5
    losses = [float(value) for value in re.findall(r"^step .*loss ([\d.]+)$", said, re.MULTILINE)]
    assert losses[-1] < losses[0] * 0.7  # batches of four windows differ
    means = {name: float(mean) for name, mean in re.findall(r"^(\w[\w ]*?)  +.* ([\d.]+)$", said, re.MULTILINE)}
    assert means["greedy oracle"] < means["recency"] - 1 and means["BM25 of the tail"] < means["recency"] - 0.5
    assert abs(means["recency"] - means["gists"]) < 0.3 and means["LensNet"] < means["recency"] + 0.1


# What the prose of a notebook says about its results, checked on what a run printed.
CHECKS = {
    "01_first_gist": trained_gist_is_above_the_last_token,
    "02_memory": edits_count_and_nothing_is_lost_on_the_way_to_the_disk,
    "03_focus": measured_values_find_the_block_that_is_needed,
}


def test_every_notebook_has_a_check():
    assert [path.stem for path in NOTEBOOKS] == [*CHECKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_committed_notebook_shows_its_results_and_nothing_of_the_machine_that_made_them(path):
    assert path.stat().st_size < 300_000
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]  # run once, from top to bottom
    said = streams(notebook)
    assert not said["stderr"] and "\r" not in said["stdout"] and "Warning" not in said["stdout"]
    CHECKS[path.stem](said["stdout"])
    assert not re.search(r"(?<![\w.])/(home|root|work|tmp|usr|opt|Users)/", json.dumps(outputs(notebook)))
    images = [output for output in outputs(notebook) if "image/png" in output.get("data", {})]
    assert len(images) >= 2
    metadata = {key for cell in notebook.cells for key in cell.metadata}
    assert not metadata - {"tags"}  # no times of execution: they would change with every run


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_code_and_prose_take_turns(path):
    cells = [cell.cell_type for cell in nbformat.read(path, as_version=4).cells]
    assert cells[0] == cells[-1] == "markdown"
    assert ("code", "code") not in zip(cells, cells[1:], strict=False)


@pytest.mark.long
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom_in_any_folder(path, tmp_path):
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    before = kinds(notebook)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert list(tmp_path.iterdir()) == []
    said = streams(notebook)
    assert not said["stderr"] and "\r" not in said["stdout"]
    assert kinds(notebook) == before
    CHECKS[path.stem](said["stdout"])
