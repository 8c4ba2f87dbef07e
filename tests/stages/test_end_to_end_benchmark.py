"""The benchmark of end-to-end training runs in miniature, and its numbers add up."""

import importlib.util
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "end_to_end.py"


@pytest.mark.slow
def test_the_benchmark_reads_what_it_says_and_parts_take_less_memory_than_all_at_once(tmp_path):
    spec = importlib.util.spec_from_file_location("end_to_end", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    settings = ("asset:tiny-base", 8, "LoRA", 2048, 1, "cpu", "asset:tiny-gistnet")
    row = module.measure(*settings)
    assert 1 <= row["windows_read"] <= 8 and row["seconds_per_step"] > 0 and row["peak_mib"] > 0
    read = row["windows_read"] * (2048 // 8 + 32)
    assert row["tokens_per_second"] == pytest.approx(read / row["seconds_per_step"])
