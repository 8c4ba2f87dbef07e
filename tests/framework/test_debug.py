"""Every option of the group ``debug`` does what its first line says."""

import csv
import json

import pytest
from cases import RUNS, common, world

from megactx.framework.app import run


def values(folder, name: str) -> list[float]:
    with (folder / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


@pytest.fixture
def short(tiny_run, tmp_path):
    """The tiny run without its own lengths: the debug option sets them."""
    kept = [o for o in tiny_run if not o.startswith("preset.")]
    return [*kept, f"folder={tmp_path / 'a'}"]


@pytest.mark.slow
def test_overfit_takes_the_same_batches_over_and_over(short, tmp_path):
    still = ["stage.muon_lr=0", "stage.adamw_lr=0", "+stage.config.attention_dropout=0", "preset.steps=6"]
    still.append("preset.warmup=1")
    settings = [o for o in short if "attention_dropout" not in o]
    assert run([*settings, *still, "debug=overfit"]) == 0
    losses = values(tmp_path / "a", "train/nll")
    assert len(losses) == 6 and losses[0] != losses[1]
    assert losses == losses[:2] * 3


@pytest.mark.slow
def test_overfit_makes_the_loss_fall(short, tmp_path):
    assert run([*short, "debug=overfit", "preset.steps=40"]) == 0
    losses = values(tmp_path / "a", "train/nll")
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


@pytest.mark.slow
def test_profiler_writes_the_time_of_every_hook_to_the_run_folder(short, tmp_path):
    assert run([*short, "debug=profiler"]) == 0
    table = (tmp_path / "a" / "fit-profile.txt").read_text()
    assert "run_training_batch" in table and "SingleDeviceStrategy.training_step" in table


@pytest.mark.slow
def test_trace_writes_the_operators_to_the_run_folder(short, tmp_path):
    assert run([*short, "debug=trace"]) == 0
    (trace,) = (tmp_path / "a").glob("*training_step*.pt.trace.json")
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert "aten::mm" in names
    assert "aten::mm" in (tmp_path / "a" / "fit-trace.txt").read_text()


@pytest.mark.slow
def test_limit_runs_to_the_end_and_fdr_keeps_nothing(short, tmp_path):
    assert run([*short, "debug=limit"]) == 0
    assert (tmp_path / "a" / "checkpoints" / "last.ckpt").exists() and len(values(tmp_path / "a", "val/nll")) == 2
    rest = [o for o in short if not o.startswith("folder=")]
    assert run([*rest, "debug=fdr", f"folder={tmp_path / 'b'}"]) == 0
    assert not (tmp_path / "b" / "checkpoints").exists() and not (tmp_path / "b" / "metrics.csv").exists()


# What a matrix of stages needs beside the debug option, which sets the lengths.
LENGTHS = ("preset.steps", "preset.warmup", "preset.validate_every", "stage.steps", "stage.cycles")
LENGTHS += tuple(f"stage.evaluate.{name}" for name in ("blocks", "copies", "level2", "documents", "oracle", "planted"))
LENGTHS += ("stage.windows.per_round", "stage.windows.rounds", "stage.windows.variants", "preset.validation_documents")
OVERFIT = ["preset.steps=6", "preset.warmup=1", "preset.validate_every=3", "preset.alternating.gist=6"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return world(tmp_path_factory.mktemp("matrix"))


@pytest.mark.slow
@pytest.mark.parametrize("option", ["fdr", "limit", "overfit", "profiler", "trace"])
@pytest.mark.parametrize("stage", ["gist", "lens", "alternating", "end_to_end"])
def test_every_option_works_for_every_stage(stage, option, places, tmp_path):
    kept = [setting for setting in RUNS[stage](places) if not setting.startswith(LENGTHS)]
    kept += [*common(tmp_path / "run", places), "trainer.precision=32-true"]
    assert run([*kept, f"debug={option}", *(OVERFIT if option == "overfit" else [])]) == 0
    assert (tmp_path / "run" / "done").exists()
    assert (tmp_path / "run" / "checkpoints").exists() == (option != "fdr")


@pytest.mark.slow
@pytest.mark.parametrize("option", ["fdr", "limit", "overfit", "profiler", "trace"])
def test_the_tokenizer_which_trains_in_no_steps_takes_every_option_too(option, places, tmp_path):
    own = ["experiment=tokenizer", f"data.path={places['texts']}", "data=files", "stage.vocab_size=300"]
    assert run([*own, f"folder={tmp_path / 'run'}", f"debug={option}"]) == 0
