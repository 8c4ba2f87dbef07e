"""Prefills that are made before a run are those that the run would make."""

import pytest
import torch

from megactx.framework.app import run
from megactx.stages import prefills
from megactx.stages.prefills import main

KEEPS = ["stage.prefills.gigabytes=1", "gistnet.input=hidden", "gistnet.input_layer=1"]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.safetensors")}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_run_finds_the_bits_that_it_would_have_made_itself(gist_settings, tmp_path, monkeypatch, precision, capsys):
    given, found = [*gist_settings, *KEEPS, f"trainer.precision={precision}", "stage.evaluate.controls=false"], {}
    monkeypatch.setattr(prefills, "SHARD", 1_000)
    for name in ("run", "before"):
        monkeypatch.setenv("MEGACTX_CACHE", str(tmp_path / name))
        assert name == "run" or main(given) == 0
        if name == "run":
            assert run([*given, f"folder={tmp_path / 'a'}"]) == 0
        found[name] = contents(tmp_path / name)
    assert "0 were there, 0 have no room" in capsys.readouterr().out
    assert len(found["before"]) > len(found["run"]) > 8
    for path, content in found["run"].items():
        assert found["before"][path] == content, path
    assert run([*given, f"folder={tmp_path / 'b'}"]) == 0
    assert contents(tmp_path / "before") == found["before"]
    one, two = (torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True) for name in "ab")
    assert all(torch.equal(value, two["state_dict"][name]) for name, value in one["state_dict"].items())


@pytest.mark.slow
def test_documents_that_have_no_room_are_told_and_those_that_are_there_are_not_read_again(
    gist_settings, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("MEGACTX_CACHE", str(tmp_path))
    few = [*gist_settings, "stage.prefills.gigabytes=1e-3"]  # 320 bytes a token: for about 3,000 tokens
    assert main(few) == 0
    first = capsys.readouterr().out.splitlines()[-1]
    assert "0 were there" in first and "0 have no room" not in first
    before = contents(tmp_path)
    assert 0.5e6 < sum(map(len, before.values())) < 1.1e6
    assert main([*gist_settings, "stage.prefills.gigabytes=1"]) == 0
    assert f"{len(before)} were there, 0 have no room" in capsys.readouterr().out
    assert all(contents(tmp_path)[path] == content for path, content in before.items())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["stage.prefills.gigabytes=0"], "stage.prefills.gigabytes=0 keeps none"),
        (["datamodule.interleave=0.5"], "datamodule.interleave and datamodule.adversarial make documents anew"),
        (["preset.stepz=3"], "preset.stepz: no such setting"),
        (["data.path=/nowhere"], "data.path=/nowhere"),
    ],
)
def test_what_cannot_be_made_before_is_told_in_one_line(gist_settings, more, message, capsys):
    assert main([*gist_settings, "stage.prefills.gigabytes=1", *more]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("experiment", "message"), [("base_lm", "this stage keeps no prefills"), ("curriculum", "curriculum: each of its")]
)
def test_a_run_that_keeps_no_prefills_is_told(experiment, message, capsys):
    assert main([f"experiment={experiment}"]) == 2
    assert message in capsys.readouterr().err
