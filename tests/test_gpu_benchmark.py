"""The figures that are promised of a card: one page, one command, no claim without a run."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu", REPOSITORY / "benchmarks" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "gpu", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PAGE", tmp_path / "gpu.md")
    return module


def test_the_page_says_of_every_figure_that_no_card_has_measured_it(gpu):
    told = (REPOSITORY / "docs" / "gpu.md").read_text()
    assert told == gpu.page({}, gpu.NEVER) and told.count("never measured on a card") == len(gpu.FIGURES)


def test_a_figure_is_judged_by_its_goal_and_one_without_a_value_is_not(gpu):
    packed = {"rows": [{"ratio": {"full": 59.0}, "compiled_times_faster": 1.26}]}
    step = {"spans_per_second": 7.0, "mfu": None, "peak": 105.0, "expected": 100.0}
    encode = {"matmul": [{"share": 0.3, "dtype": "float32"}, {"share": 0.61, "dtype": "bfloat16"}]}
    found = {"packed": packed, "step 3B": step, "encode": encode}
    table = {what: (said, judged) for what, _, said, judged in gpu.rows(found)}
    assert table["GistNet's encode, % of its own matrix products in bf16"] == ("61", True)
    assert table["packed pass over a loop of full forwards, T = 4,096, H = 32"] == ("59.0", False)
    assert table["the packed pass with its decoder compiled (torch.compile), times faster"] == ("1.26", None)
    assert table["memory of it, % away from the estimate"] == ("5", True)
    assert table["blocks a second in training, shapes of SmolLM3-3B, T = 16,384"] == ("7.0", None)
    assert [said for what, _, said, _ in gpu.rows({"step 3B": step}) if what == "MFU of it, %"][1] == "-"


@pytest.mark.slow
def test_a_part_that_fails_is_told_and_the_others_run(gpu, monkeypatch, capsys):
    broken = gpu.Part("shapes.py", [], ["--shapes", "none"], 60)
    late = gpu.Part("shapes.py", [], gpu.STEP, 0)
    monkeypatch.setattr(gpu, "PARTS", {"step 3B": broken, "step 135M": late})
    assert gpu.main(["--miniature"]) == 3
    told = capsys.readouterr().out
    assert "invalid choice" in told and "not done after 0 s" in told and not gpu.PAGE.exists()


@pytest.mark.slow
def test_a_part_that_ran_on_the_cpu_is_no_figure_of_a_card(gpu, tmp_path):
    part = gpu.Part("substitution.py", ["--horizons", "32", "--tokens", "128", "--cpu"], [], 60)
    assert gpu.measure(part, False, tmp_path) == "measured on cpu, not on a card"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_without_a_card_it_says_what_runs_instead(gpu, capsys):
    assert gpu.main([]) == 2
    assert "--miniature" in capsys.readouterr().err


@pytest.mark.long
def test_every_part_runs_in_miniature_and_has_the_numbers_that_the_page_wants(gpu, capsys, tmp_path):
    for name, part in gpu.PARTS.items():
        found = gpu.measure(part, True, tmp_path)
        assert isinstance(found, dict), (name, found)
        for figure in gpu.FIGURES:
            if figure.part == name:
                value = figure.value(found)
                assert value is None or value >= 0, (figure.what, json.dumps(found)[:500])
