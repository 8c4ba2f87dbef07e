"""The benchmark of focusing runs in miniature, and what it reports adds up."""

import importlib.util
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MINIATURE = "--shapes smollm3 --cpu --layers 2 --width 64 --vocabulary 512 --repeats 1 --sample 3"


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        spec = importlib.util.spec_from_file_location("focus", BENCHMARKS / "focus.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


def test_the_benchmark_runs_at_the_shapes_of_a_large_model_in_miniature(benchmark, tmp_path, capsys):
    out = tmp_path / "focus.json"
    benchmark.main([*MINIATURE.split(), *"--tokens 512 --budgets 0.5 --windows 384 --out".split(), str(out)])
    said, found = capsys.readouterr().out, json.loads(out.read_text())
    assert "cost of a label" in said and "a refocus against decoding 32 tokens" in said
    assert [row["edits"] > 0 for row in found["labels"]] == [True, True]
    assert all(row["largest_difference"] < 1e-4 and row["measured_ms"] > 0 < row["plain_ms"] for row in found["labels"])
    (row,) = found["refocusing"]
    assert row["entries"] <= row["window"] == 384 and row["edits"] > 0
    for whole, *parts in zip(*(row["seconds"][n] for n in ("refocus", "lensnet", "allocator", "edits")), strict=True):
        assert whole == pytest.approx(sum(parts)) and min(parts) > 0
    assert row["share_of_decoding"]["refocus"] == pytest.approx(row["ms"]["refocus"] / row["ms"]["decode"])


def test_a_table_that_is_not_asked_for_is_not_measured(benchmark, tmp_path, capsys):
    out = tmp_path / "focus.json"
    benchmark.main([*MINIATURE.split(), "--tokens", "--windows", "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["labels"] == found["refocusing"] == []
    assert "cost of a label" not in capsys.readouterr().out
