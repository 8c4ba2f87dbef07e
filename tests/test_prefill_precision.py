"""The benchmark of kept prefills: 32 bits change nothing of a gradient, 16 bits little, and it is the subject's."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def benchmark():
    place = Path(__file__).parents[1] / "benchmarks" / "prefill_precision.py"
    spec = importlib.util.spec_from_file_location("prefill_precision", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_error_of_16_bits_is_small_and_that_of_32_bits_is_rounding(benchmark, gist_settings, capsys):
    given = [option for option in gist_settings if not option.startswith("gistnet.")] + ["gistnet.num_heads=4"]
    _, gradient, found = benchmark.measured(given, None, 0)
    assert gradient.norm() > 0
    assert found["float32"][0] < 1e-5 < found["float16"][0] < 2e-2
    assert benchmark.main([*given, "--seeds", "2"]) == 0
    assert "two batches" in capsys.readouterr().out
