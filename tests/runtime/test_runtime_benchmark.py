"""The benchmark of sessions runs in miniature, and what it reports adds up."""

import importlib.util
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MINIATURE = "--shapes smollm3 --cpu --layers 1 --width 64 --vocabulary 512 --budget 512 --blocks 1"


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        spec = importlib.util.spec_from_file_location("runtime_benchmark", BENCHMARKS / "runtime.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


@pytest.mark.slow
def test_the_benchmark_runs_at_the_shapes_of_a_large_model_in_miniature(benchmark, tmp_path, capsys):
    out = tmp_path / "runtime.json"
    sizes = "--lengths 600 2400 --prompts 512 1024 2048 --full-most 1024 --out"
    benchmark.main([*MINIATURE.split(), *sizes.split(), str(out)])
    said, found = capsys.readouterr().out, json.loads(out.read_text())
    assert "per token" in said and "until the first token" in said and "~" in said
    assert [(row["kind"], row["tokens"] // 600) for row in found["per_token"]] == [
        ("recency", 1),
        ("focus", 1),
        ("recency", 4),
        ("focus", 4),
    ]
    for row in found["per_token"]:
        assert row["entries"] <= 512 and 0 <= row["reuse"] <= 1 and row["ms"] > 0 and row["refocus_ms"] > 0
    assert [row["tokens"] for row in found["until_first"]] == [512, 1024, 2048]
    assert [row["full"] is None for row in found["until_first"]] == [False, False, True]
    assert all(row["cold"] > 0 and row["warm"] > 0 and row["full_fit"] > 0 for row in found["until_first"])


def test_the_crossover_is_where_the_fits_meet(benchmark):
    rows = [{"tokens": n, "full": 1e-4 * n + 1e-7 * n * n, "cold": 1.0 + 5e-4 * n} for n in (1000, 2000, 4000)]
    full, cold = benchmark.extrapolated(rows)
    assert full == pytest.approx([1e-4, 1e-7]) and cold == pytest.approx([1.0, 5e-4])
    n = benchmark.crossover(full, cold)
    assert 1e-4 * n + 1e-7 * n * n == pytest.approx(1.0 + 5e-4 * n)
    assert benchmark.crossover([1e-4, 0.0], cold) is None
