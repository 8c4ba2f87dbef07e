import csv
import json

import pytest
import yaml
from block_scores import synthetic

from megactx.evaluation.bootstrap import difference_intervals
from megactx.evaluation.leaderboard import build, main, report, report_of
from megactx.evaluation.pictures import side_by_side
from megactx.evaluation.report import report_of as report_of_run
from megactx.evaluation.runs import find_runs, labels
from megactx.evaluation.summary import summarise


def make_run(folder, recovery=0.6, seed=0, scores=None, flops=1e6, steps=10, **settings):
    """A run folder as the stage leaves it. Settings are those of the GistNet, or ``group_key=value`` of others."""
    gistnet = dict(type="transformer", head="mlp", pooling="mean", layers=2)
    gistnet |= {key: value for key, value in settings.items() if key in gistnet}
    config = {
        "stage": {"gistnet": gistnet, "lr": settings.get("lr", 0.001), "max_steps": steps},
        "datamodule": {"seed": seed, "spans": 3},
        "base": {"name": settings.get("base", "asset:tiny-base")},
        "gistnet": gistnet,
        "preset": {"steps": steps, "accumulate": 2, "batch": 4, "spans": 3},
        "trainer": {"devices": 1, "default_root_dir": str(folder)},
        "seed": seed,
        "folder": str(folder),
        "name": folder.name,
    }
    scores = scores or synthetic(blocks=200, recovery={"last token": 0.3, "gistnet": recovery})
    numbers = summarise(scores)
    numbers["flops_per_block"] = {"gistnet": flops}
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "run.yaml").write_text("{}")
    scores.save(folder / "scores")
    report_of_run(numbers).write(folder / "report", numbers)
    (folder / "done").touch()
    return folder


def names(board):
    return [row.name for row in board.rows]


def test_runs_are_ranked_by_recovery_and_named_by_the_settings_in_which_they_differ(tmp_path):
    make_run(tmp_path / "a", 0.4, head="linear")
    make_run(tmp_path / "b", 0.7, layers=4)
    make_run(tmp_path / "c" / "deep", 0.5)
    board = build([tmp_path])
    assert names(board) == ["head=mlp layers=4", "head=mlp layers=2", "head=linear layers=2"]
    assert [row.rank for row in board.rows] == [1, 2, 3]
    assert board.notes == [] and board.missing == []


def test_a_row_has_the_figures_and_intervals_of_its_report(tmp_path):
    numbers = json.loads((make_run(tmp_path / "a") / "report.json").read_text())["groups"]["overall"]
    (row,) = build([tmp_path]).rows
    assert row.recovery["all"] == numbers["recovery"]["gistnet"]["all"]
    assert row.recovery["body"] == numbers["recovery"]["gistnet"]["body"]
    assert row.figures["dnll"] == numbers["rows"]["gistnet"]["dnll"]
    assert row.flops == 1e6 and row.name == "a"  # alone it differs from nothing


def test_training_tokens_are_the_predictions_under_the_loss(tmp_path):
    make_run(tmp_path / "a", steps=10)
    (row,) = build([tmp_path]).rows
    assert row.runs[0].training_tokens == 10 * 2 * 4 * 3 * 32


def test_steps_and_parameters_are_read_from_the_checkpoint_where_there_is_one(tmp_path):
    import torch

    run = make_run(tmp_path / "a", steps=10)
    (run / "checkpoints").mkdir()
    state = {"nets.gistnet.a": torch.zeros(2, 3), "nets.blockmean.a": torch.zeros(9), "base.a": torch.zeros(9)}
    torch.save({"state_dict": state, "global_step": 7}, run / "checkpoints" / "last.ckpt")
    (row,) = build([tmp_path]).rows
    assert row.runs[0].parameters == 6 and row.runs[0].steps == 7  # it stopped early


def test_runs_that_differ_in_their_seed_only_are_one_row_with_mean_and_spread(tmp_path):
    for seed, recovery in enumerate((0.5, 0.6, 0.7)):
        make_run(tmp_path / f"s{seed}", recovery, seed=seed)
    make_run(tmp_path / "other", 0.3, layers=1)
    first, second = build([tmp_path]).rows
    points = [run.report["groups"]["overall"]["recovery"]["gistnet"]["all"]["point"] for run in first.runs]
    assert first.recovery["all"]["point"] == pytest.approx(sum(points) / 3)
    assert first.recovery["all"]["std"] == pytest.approx(0.1, abs=0.01)
    assert "low" not in first.recovery["all"] and "std" not in second.recovery["all"]
    assert "(3 seeds)" in report_of(build([tmp_path])).sheets[0].rows[0][2]
    assert second.to_best["all"].point == pytest.approx(second.recovery["all"]["point"] - sum(points) / 3)


def test_a_difference_to_the_best_is_the_paired_bootstrap_whatever_the_order_of_the_blocks(tmp_path):
    scores = synthetic(blocks=200, noise=0.3, recovery={"gistnet": 0.6})
    scores.carriers["worse"] = scores.carriers["gistnet"] + 0.02
    expected = difference_intervals(scores, "worse", ["gistnet"])["gistnet"]
    worse = synthetic(blocks=200, noise=0.3, recovery={"gistnet": 0.6})
    worse.carriers["gistnet"] += 0.02
    order = list(range(199, -1, -1))
    shuffled = type(worse)(
        full=worse.full[order],
        drop=worse.drop[order],
        carriers={"gistnet": worse.carriers["gistnet"][order]},
        domain=[worse.domain[index] for index in order],
        document=worse.document[order],
        start=worse.start[order],
    )
    make_run(tmp_path / "a", scores=synthetic(blocks=200, noise=0.3, recovery={"gistnet": 0.6}))
    make_run(tmp_path / "b", scores=shuffled, layers=4)
    best, other = build([tmp_path]).rows
    assert (best.verdict("all"), other.verdict("all")) == ("best", "below")
    # Resampling draws the documents in another order, so the ends agree only nearly.
    assert other.to_best["all"] == pytest.approx(expected, abs=1e-4)


def test_what_the_bootstrap_cannot_tell_apart_is_a_tie(tmp_path):
    for name, seed in (("a", 1), ("b", 2)):  # the same recovery, other noise per document
        own = synthetic(blocks=200, noise=0.0, recovery={"gistnet": 0.6})
        own.carriers["gistnet"] = own.full + synthetic(blocks=200, noise=0.3, seed=seed).carriers["gistnet"] * 0.1
        make_run(tmp_path / name, scores=own, layers=seed)
    _, other = build([tmp_path]).rows
    assert other.verdict("all") == "tie"
    assert other.to_best["all"].low < 0 < other.to_best["all"].high


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(steps=20), "training tokens: 7,680 (1 run), 15,360 (1 run)"),
        (dict(base="other"), "the base: asset:tiny-base (1 run), other (1 run)"),
        (dict(scores=synthetic(blocks=200, horizon=64)), "the horizon: 32 (1 run), 64 (1 run)"),
        (dict(scores=synthetic(blocks=100)), "the evaluated blocks"),
    ],
    ids=["tokens", "base", "horizon", "blocks"],
)
def test_runs_that_cannot_be_compared_are_said_to_be_so(tmp_path, settings, said):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", layers=4, **settings)
    board = build([tmp_path])
    assert any(said in note and "NOT COMPARABLE" in note for note in board.notes)
    paired = board.rows[1].to_best is not None
    assert paired == ("tokens" in said)  # only on the same blocks and base is there a paired difference


def test_without_scores_there_is_a_row_but_no_verdict(tmp_path):
    make_run(tmp_path / "a")
    run = make_run(tmp_path / "b", 0.5, layers=4)
    (run / "scores.safetensors").unlink()
    _, other = build([tmp_path]).rows
    assert other.to_best is None and other.verdict("all") == ""


def test_an_undefined_recovery_ranks_last_and_says_so(tmp_path):
    make_run(tmp_path / "a", layers=4, scores=synthetic(blocks=200, cost=0.001))
    make_run(tmp_path / "b", -0.5)
    board = build([tmp_path])
    assert names(board) == ["layers=2", "layers=4"] and report_of(board).sheets[0].rows[1][2] == "undefined"
    assert report([tmp_path], tmp_path / "out").rows and (tmp_path / "out" / "leaderboard.png").exists()


def test_runs_without_a_result_are_listed_with_the_reason(tmp_path):
    make_run(tmp_path / "good")
    for name in ("failed", "refused", "killed", "stopped", "base_lm", "lens"):
        (tmp_path / name).mkdir()
        if name != "refused":
            (tmp_path / name / "config.yaml").write_text("seed: 0\n")
            (tmp_path / name / "run.yaml").write_text("{}")
    trace = (
        "Traceback\n  File\nValueError: preset.batch=0: no\n\nThe above\n\nTraceback\nInstantiationError: key: stage\n"
    )
    (tmp_path / "failed" / "error.txt").write_text(trace)
    (tmp_path / "refused" / "outcome.json").write_text(json.dumps(dict(state="failed", message="lrr: no\nmore")))
    (tmp_path / "killed" / "outcome.json").write_text(json.dumps(dict(state="running", message="")))
    (tmp_path / "base_lm" / "done").touch()
    (tmp_path / "lens" / "done").touch()
    (tmp_path / "lens" / "report.json").write_text(json.dumps(dict(budgets={})))  # a report of windows
    board = build([tmp_path])
    assert len(board.rows) == 1
    assert {run.folder.name: run.reason for run in board.missing} == {
        "failed": "failed: ValueError: preset.batch=0: no",
        "refused": "failed: lrr: no",
        "killed": "not finished: it runs, or was killed",
        "stopped": "not finished: it runs, or was stopped",
        "base_lm": "its stage writes no report of gists",
        "lens": "its stage writes no report of gists",
    }


def test_a_run_that_goes_on_counts_as_unfinished_though_its_old_report_is_there(tmp_path):
    (make_run(tmp_path / "a") / "done").unlink()
    assert not build([tmp_path]).rows


def test_a_loggers_own_config_is_no_run_and_a_run_is_counted_once(tmp_path):
    run = make_run(tmp_path / "a")
    (run / "wandb" / "files").mkdir(parents=True)
    (run / "wandb" / "files" / "config.yaml").write_text("wandb_version: 1\n")
    assert [found.folder for found in find_runs([tmp_path, run])] == [tmp_path / "a"]


def test_settings_that_go_along_with_another_are_named_once_and_those_without_effect_not_at_all(tmp_path):
    make_run(tmp_path / "a", 0.7, layers=1)
    make_run(tmp_path / "b", 0.6, layers=2)
    make_run(tmp_path / "c", 0.3, type="mean", lr=0.01)  # pooling and layers say nothing without a backbone
    told, along = labels(find_runs([tmp_path]))
    assert told == [
        {"type": "transformer", "layers": 1},
        {"type": "transformer", "layers": 2},
        {"type": "mean"},
    ]
    assert along == ["type goes along with lr"]


def test_settings_of_which_each_run_has_its_own_value_are_all_shown(tmp_path):
    make_run(tmp_path / "a", lr=0.00212345, head="linear")
    make_run(tmp_path / "b", lr=0.01)
    board = build([tmp_path])
    assert {*names(board)} == {"head=linear lr=0.002123", "head=mlp lr=0.01"} and board.notes == []


def test_files_hold_every_row_and_every_missing_run(tmp_path):
    make_run(tmp_path / "a", layers=4)
    make_run(tmp_path / "b", 0.3)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "run.yaml").write_text("{}")
    assert main([str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        f"leaderboard.{end}" for end in ("csv", "json", "md", "png")
    ]
    with (tmp_path / "out" / "leaderboard.csv").open() as file:
        rows = list(csv.DictReader(file))
    told = json.loads((tmp_path / "out" / "leaderboard.json").read_text())
    assert [row["run"] for row in told["rows"]] == [row["run"] for row in rows if row["metric"] == "rank"]
    first, second = told["rows"]
    assert first["run"] == "layers=4" and second["verdict"]["all"] == "below"
    points = {(row["run"], row["metric"]): float(row["point"]) for row in rows if row["span"] == "all"}
    behind = points[second["run"], "recovery"] - points[first["run"], "recovery"]
    assert points[second["run"], "to best"] == pytest.approx(behind)
    assert "not finished" in told["missing"][str(tmp_path / "c")] and "not finished" in rows[-1]["metric"]
    assert rows[-1]["run"] == str(tmp_path / "c")
    text = (tmp_path / "out" / "leaderboard.md").read_text()
    assert "| **1** | **layers=4** |" in text and "not finished" in text
    assert (tmp_path / "out" / "leaderboard.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_has_one_labelled_point_per_row_and_the_controls_lines(tmp_path):
    from matplotlib.axes import Axes

    make_run(tmp_path / "a", 0.7, pooling="cls", flops=2e6)
    make_run(tmp_path / "b", 0.5, head="linear", flops=1e6)
    make_run(tmp_path / "c", 0.4, layers=4, flops=3e6)
    seen = []
    original = Axes.errorbar

    def watched(self, x, y, *args, **kwargs):
        seen.append((x[0], round(y[0], 3), kwargs["marker"], kwargs["color"]))
        return original(self, x, y, *args, **kwargs)

    levels = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Axes, "errorbar", watched)
        patch.setattr(Axes, "axhline", lambda self, y, **kwargs: levels.append(y))
        board = report([tmp_path], tmp_path)
    last = board.rows[0].runs[0].report["groups"]["overall"]["recovery"]["last token"]
    assert levels == [0, last["all"]["point"], 0, last["body"]["point"]]
    left = {mark[1]: mark for mark in seen[:3]}
    marks = {}
    for row in board.rows:
        x, _, *mark = left[round(row.recovery["all"]["point"], 3)]
        assert x == pytest.approx(row.flops)
        marks[row.name] = mark
    cls, linear, deep = (
        next(mark for name, mark in marks.items() if part in name) for part in ("cls", "linear", "layers=4")
    )
    assert cls[1] != deep[1] and linear[1] == deep[1]  # colour by pooling
    assert linear[0] != deep[0] and cls[0] == deep[0]  # marker by head


def test_points_of_nearly_equal_flops_stand_side_by_side_around_them():
    x = side_by_side([1e6, 1.1e6, 5e6, 1.05e6])
    near = sorted([x[0], x[1], x[3]])
    assert x[2] == pytest.approx(5e6) and near[1] == pytest.approx(1.05e6, rel=0.01)
    assert near[1] / near[0] == pytest.approx(near[2] / near[1]) and near[1] / near[0] > 1.05


def test_mistakes_end_with_code_2_and_no_result_with_code_3(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 2
    assert "there is no run in it" in capsys.readouterr().err
    (tmp_path / "run.yaml").write_text("{}")
    assert main([str(tmp_path)]) == 3
    assert "not finished" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["run.yaml"]
