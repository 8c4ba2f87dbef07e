"""The command that reads documents under MegaAttention's mask and beside it."""

import json

import torch

from megactx.lm import masks
from megactx.studies.mega_attention import FULL, main, window_of


def test_a_window_of_equal_pairs_sees_as_many_pairs():
    for share in (0.1, 0.3, 0.9, 1.0):
        wide, at = window_of(share, 200, 8), torch.arange(200)
        seen = masks.causal(200)[0, 0] & ((at[:, None] - at < wide) | (at < 8))
        assert abs(int(seen.sum()) - share * 200 * 201 / 2) <= 200


def test_the_command_compares_four_masks_on_the_same_documents(texts, tmp_path, capsys):
    sizes = ["--tokens", "256", "--documents", "2", "--segment", "32", "--mid", "64", "--live", "64"]
    assert main(["--path", str(texts), *sizes, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "mega without gists" in shown and "sink and " in shown
    rows = json.loads((tmp_path / "mega_attention.json").read_text())["table"]
    found = {(row["metric"], row["carrier"], row.get("span")): row["point"] for row in rows}
    assert found["dnll", FULL, "settled"] == 0 and found["dnll", FULL, "live"] == 0
    assert 0 < found["pairs", "mega", None] < 1
    # Live rows see every token, so gists of what is far change nothing for them but what settled rows hold.
    assert abs(found["dnll", "mega", "live"]) < abs(found["dnll", "mega", "settled"])


def test_strips_cost_pairs(texts, tmp_path):
    sizes = ["--tokens", "256", "--documents", "2", "--segment", "32", "--mid", "64", "--live", "64"]
    pairs = []
    for overlap in ("0", "32"):
        out = tmp_path / overlap
        assert main(["--path", str(texts), *sizes, "--overlap", overlap, "--out", str(out)]) == 0
        rows = json.loads((out / "mega_attention.json").read_text())["table"]
        pairs += [row["point"] for row in rows if row["metric"] == "pairs" and row["carrier"] == "mega"]
    assert pairs[0] < pairs[1]


def test_a_folder_that_is_no_run_of_the_stage_is_refused(tmp_path, capsys, monkeypatch):
    gist = {"hyper_parameters": {"gistnet": {}}}
    monkeypatch.setattr("megactx.studies.mega_attention.checkpoint_of", lambda path: (path, gist))
    assert main(["--trained", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 2
    assert "it is no run of experiment=mega_attention" in capsys.readouterr().err


def test_a_size_that_does_not_fit_is_refused(texts, tmp_path, capsys):
    options = ["--path", str(texts), "--tokens", "256", "--documents", "2", "--out", str(tmp_path)]
    assert main([*options, "--segment", "40"]) == 2
    assert "--segment=40 is not allowed" in capsys.readouterr().err
