"""Two builds side by side: every figure of a turn over that of the same turn, in one table."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def beside(monkeypatch):
    spec = importlib.util.spec_from_file_location("beside", ROOT / "benchmarks" / "beside.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_ratios_are_of_one_turn_and_the_builds_take_turns(beside, monkeypatch, tmp_path, capsys):
    (tmp_path / "megactx").mkdir()
    asked = []

    def measured(tree, row):
        asked.append((tree.name, row))
        busy = 1 + len(asked) // 3  # the machine gets slower
        return {"label": {1: 0.3, 2: 0.1, 3: 0.3, 4: 0.2}[len(asked)] * busy, "plain re-run": 0.6 * busy}

    monkeypatch.setattr(beside, "measured", measured)
    out = tmp_path / "beside.json"
    assert beside.main([str(tmp_path), "--only", "label", "--turns", "2", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert [name for name, _ in asked] == [tmp_path.name, ROOT.name] * 2 and {row for _, row in asked} == {"label"}
    assert "1.5 / 2.25 / 3" in next(line for line in said.splitlines() if line.startswith("label"))
    shares = next(line for line in said.splitlines() if line.startswith("plain re-run / label"))
    assert "2 / 2 / 2" in shares and "3 / 4.5 / 6" in shares
    assert len(json.loads(out.read_text())["old"]["label"]) == 2


@pytest.mark.parametrize(("given", "said"), [(["--only", "labels"], "labels is not known"), ([], "holds no megactx")])
def test_an_unknown_row_and_a_folder_without_a_build_are_refused(given, said, tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "beside.py"), str(tmp_path), *given]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and said in done.stderr
