"""From tokenizer to answers in one command, and to the same weights after a stop anywhere."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from megactx.evaluation import page
from megactx.evaluation.page import in_browser
from megactx.framework.app import run
from megactx.lm import BaseLM
from megactx.stages.base_lm import BaseLMStage
from megactx.stages.sft import SFTStage

STAGES = "run10_tokenizer,run10_base,run10_sft"


@pytest.fixture
def chain(texts, tmp_path):
    """Overrides of a chain in miniature, on files; a test adds ``folder=...``."""
    for path in texts.glob("*.py"):
        for ending in (".py", ".md", ".json"):
            (tmp_path / "texts").mkdir(exist_ok=True)
            (tmp_path / "texts" / path.with_suffix(ending).name).write_text(path.read_text() + ending)
    talk = [{"role": "user", "content": "Say yes."}, {"role": "assistant", "content": "Yes."}]
    (tmp_path / "talk.jsonl").write_text("\n".join(json.dumps({"messages": talk, "n": n}) for n in range(4)))
    arguments = ["experiment=run10", "preset=smoke", f"curriculum=[{STAGES}]", "trainer=cpu", "preset.tasks=60"]
    arguments += ["data=files", f"data.path={tmp_path / 'texts'}", "conversations=files", "preset.report.card=2"]
    arguments += [f"conversations.path={tmp_path / 'talk.jsonl'}", "preset.run10.vocabulary=400"]
    return [*arguments, "preset.run10.width=32", "preset.run10.layers=1", "preset.run10.heads=2"]


@pytest.mark.long
def test_a_chain_that_stops_anywhere_goes_on_to_the_same_weights_and_ends_with_a_page(chain, tmp_path, dies_at, capsys):
    assert run([*chain, f"folder={tmp_path / 'whole'}"]) == 0, capsys.readouterr().err
    page = (tmp_path / "whole" / "report.md").read_text()
    assert "<h2>Stage run10_base</h2>" in (tmp_path / "whole" / "report.html").read_text()
    for said in ("What each stage gained", "held-out conversations: tasks", "recall, dropping", "What run10_sft says"):
        assert said in page
    assert all(f"## Stage {name}" in page for name in ("run10_base", "run10_sft"))
    part = [*chain, f"folder={tmp_path / 'part'}"]
    for kind, method, time in (
        (BaseLMStage, "training_step", 4),  # behind a checkpoint
        (BaseLMStage, "finish", 1),  # all is learned, and nothing is written
        (SFTStage, "training_step", 1),  # nothing is learned yet
        (SFTStage, "training_step", 2),
    ):
        dies_at(kind, method, time)
        assert run([*part, "resume=auto"]) == 3, (kind, method)
        assert "the power is gone" in capsys.readouterr().err, (kind, method)
    assert run([*part, "resume=auto"]) == 0, capsys.readouterr().err
    for name in ("run10_base", "run10_sft"):
        one, other = (load_file(tmp_path / side / name / "model" / "model.safetensors") for side in ("whole", "part"))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), name
    assert BaseLM.from_pretrained(str(tmp_path / "part" / "run10_sft" / "model")).tokenizer.chat_template


@pytest.mark.slow
def test_a_stock_chain_has_the_weights_of_the_chain_with_gists_and_makes_none(chain, tmp_path, monkeypatch, capsys):
    stages, ends = "curriculum=[run10_tokenizer,run10_base,run10_sft,run10_gist]", ["preset.run10.gist.steps=1"]
    shorter = [*ends, "preset.run10.base.steps=4", "preset.run10.base.every=4", "preset.run10.gist.every=1"]
    chain = [*chain, stages, *shorter]
    assert run([*chain, f"folder={tmp_path / 'with'}"]) == 0, capsys.readouterr().err
    assert run([*chain, "megacontext=none", f"folder={tmp_path / 'none'}"]) == 0, capsys.readouterr().err
    assert "Stage 3 of 3: run10_sft" in capsys.readouterr().out
    assert (tmp_path / "with" / "run10_gist").exists() and not (tmp_path / "none" / "run10_gist").exists()
    told = tmp_path / "none" / "report.md"
    text = told.read_text()
    assert "What run10_sft says" in text and text.count("## Stage run10_base") == 1
    html = (tmp_path / "none" / "report.html").read_text()
    monkeypatch.chdir(tmp_path / "none")
    assert page.main(["."]) == 0 and told.read_text() == text
    assert (tmp_path / "none" / "report.html").read_text() == html and "<title>none</title>" in html
    told.unlink()
    assert page.main(["."]) == 0 and told.read_text() == text  # from the numbers and the stages
    assert (tmp_path / "none" / "report.html").read_text() == html
    shutil.copytree(tmp_path / "none" / "run10_base", tmp_path / "kept")
    shutil.rmtree(tmp_path / "none" / "run10_base")
    assert page.main(["."]) == 0 and told.read_text() == text  # what was written stays
    told.unlink()
    capsys.readouterr()
    assert page.main(["."]) == 0 and "without their own reports: run10_base" in capsys.readouterr().out
    shutil.copytree(tmp_path / "kept", tmp_path / "none" / "run10_base")
    for name in ("run10_base", "run10_sft"):
        one, other = (load_file(tmp_path / side / name / "model" / "model.safetensors") for side in ("with", "none"))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), name


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["experiment=gist_stage1"], "megacontext=none: GistStage trains or reads gists"),
        (["experiment=base_lm", "stage.gists=0.5"], "stage.gists=0.5: allowed with megacontext=none is 0"),
        (["experiment=run10", "curriculum=[run10_gist,run10_lens]"], "leaves out every stage of curriculum="),
    ],
)
def test_what_a_stock_model_has_nothing_of_is_refused(settings, said, tmp_path, capsys):
    assert run([*settings, "preset=smoke", "megacontext=none", f"folder={tmp_path / 'a'}"]) == 2
    assert said in capsys.readouterr().err


def test_a_page_in_a_browser_has_its_tables_and_shows_what_a_model_says_as_text():
    page = in_browser(
        "# A chain\n\n| stage | minutes |\n|:---|---:|\n| a | <b>1 & 2</b> |\n\n![loss](a/report.png)\n", "x<y"
    )
    assert "<title>x&lt;y</title>" in page and '<img src="a/report.png" alt="loss"' in page
    assert "<td" in page and "&lt;b&gt;1 &amp; 2&lt;/b&gt;" in page


@pytest.mark.slow
def test_a_mistake_in_the_settings_of_a_later_stage_or_a_chain_that_does_not_join_is_told_first(
    chain, tmp_path, capsys
):
    assert run([*chain, "preset.run10.sft.tokens=0", f"folder={tmp_path / 'a'}"]) == 2
    assert "preset.run10.sft.tokens=0" in capsys.readouterr().err
    assert run([*chain, "curriculum=[run10_tokenizer,run10_lens]", f"folder={tmp_path / 'b'}"]) == 2
    assert "run10_lens takes base, gistnet, and those before it give tokenizer" in capsys.readouterr().err
    assert run([*chain, "conversations.path=/nowhere", f"folder={tmp_path / 'c'}"]) == 2
    assert "conversations.path=/nowhere" in capsys.readouterr().err
    assert not list(tmp_path.rglob("tokenizer.json"))
