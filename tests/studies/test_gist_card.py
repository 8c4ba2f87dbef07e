"""The card of a GistNet: one command, any text."""

import json

import pytest
import torch

from megactx.evaluation.history import measure_history
from megactx.gist.compressors import build
from megactx.lm import BaseLM
from megactx.parts.write import save_gistnet
from megactx.studies.gist_card import main

GIVEN = {"type": "base", "layers": 1, "rank": 4, "block_size": 8}
SIZES = ["--tokens", "128", "--horizon", "8", "--blocks", "12"]


@pytest.fixture(scope="module")
def gistnet(base_folder, tmp_path_factory):
    base, folder = BaseLM.from_pretrained(str(base_folder)).freeze(), tmp_path_factory.mktemp("gistnet") / "net"
    torch.manual_seed(3)
    save_gistnet(build(base, GIVEN), GIVEN, base, folder)
    return folder


def test_a_card_has_blocks_and_histories_beside_every_control_and_is_the_same_again(
    base_folder, gistnet, texts, tmp_path, capsys
):
    given = [str(base_folder), "--gistnet", str(gistnet), "--path", str(texts), *SIZES, "--segments", "4"]
    given += ["--segment", "16", "--recency", "32"]
    found = []
    for name in "ab":
        assert main([*given, "--out", str(tmp_path / name)]) == 0
        found.append((tmp_path / name / "gist_card.csv").read_text())
    assert found[0] == found[1]
    rows = json.loads((tmp_path / "a" / "gist_card.json").read_text())["table"]
    carriers = {row["carrier"] for row in rows if row["metric"] == "recovery" and "carrier" in row}
    assert {"gistnet", "last token", "random gist"} <= carriers
    assert any("history" in row["metric"] for row in rows)
    assert "12 blocks" in capsys.readouterr().out


def test_histories_that_were_measured_are_read_again_and_what_is_new_is_measured(
    base_folder, gistnet, texts, tmp_path, monkeypatch
):
    given = [str(base_folder), "--gistnet", str(gistnet), "--path", str(texts), *SIZES, "--out", str(tmp_path)]
    given += ["--segments", "4", "--segment", "16", "--recency", "32", "--controls", "last token"]
    asked = []
    monkeypatch.setattr(
        "megactx.studies.gist_card.measure_history",
        lambda base, nets, batches, **sizes: asked.append(list(nets)) or measure_history(base, nets, batches, **sizes),
    )
    kept, table = tmp_path / "histories", tmp_path / "gist_card.csv"
    assert main(given) == 0
    first, documents, files = table.read_text(), len(asked), sorted(kept.iterdir())
    assert asked == [["gistnet", "last token"]] * documents and documents > 1
    assert main(given) == 0 and len(asked) == documents and table.read_text() == first
    files[0].unlink()  # as after a stop: a document's numbers are not all there
    files[1].unlink()
    assert main(given) == 0 and len(asked) == documents + 1 and table.read_text() == first
    assert sorted(kept.iterdir()) == files
    assert main([*given, "--documents", "1"]) == 0 and len(sorted(kept.iterdir())) == len(files) + 2
    assert main([*given, "--recency", "16"]) == 0 and len(asked) > 2 * documents  # other histories
    files[0].write_bytes(b"no scores")
    assert main(given) == 2


def test_a_vector_that_is_fitted_to_each_block_stands_beside_the_gist_on_the_same_blocks(
    base_folder, gistnet, texts, tmp_path
):
    given = [str(base_folder), "--gistnet", str(gistnet), "--path", str(texts), *SIZES, "--precision", "bf16-mixed"]
    assert main([*given, "--oracle", "3", "--oracle-steps", "30", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "gist_card_oracle.json").read_text())["table"]
    kl = {row["carrier"]: row["point"] for row in rows if row["metric"] == "kl" and row["domain"] == "overall"}
    assert kl["oracle-fit"] < min(kl["gistnet"], kl["oracle-transfer"], kl["dropped"])  # it has seen the answer


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "there is no GistNet for it, give one: --gistnet PATH"),
        (["--gistnet", "nowhere"], "--gistnet=nowhere: there is no such folder"),
        (["--gistnet", "GISTNET", "--recency", "12"], "--recency=12 is not allowed: a multiple of block_size=8"),
        (
            ["--gistnet", "GISTNET", "--controls", "mean"],
            "--controls=mean is not known, allowed are last token, random",
        ),
    ],
)
def test_what_cannot_be_measured_is_told_by_its_option(base_folder, gistnet, options, said, tmp_path, capsys):
    options = [str(gistnet) if o == "GISTNET" else o for o in options]
    assert main([str(base_folder), *options, *SIZES, "--segment", "16", "--out", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err
