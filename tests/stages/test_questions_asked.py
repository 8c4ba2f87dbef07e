"""Questions in the loss of a gist stage, and a gist stage that begins with a saved GistNet."""

import csv
from pydoc_data.topics import topics

import pytest
import torch

from megactx.assets import resolve
from megactx.framework.app import run
from megactx.parts.read import load_gistnet
from tests.stages.test_compressors import built

TINY = ["experiment=demo", "preset.batch=1", "preset.spans=2", "preset.min_tokens=200", "preset.max_tokens=256"]
TINY += ["stage.controls.blockmean_linear=null"]
TINY += ["data=files", "data.weights={narrative: 1, code: 0, structured: 0}"]
ASKED = ["loss.questions.count=2", "loss.questions.tokens=[96]", "loss.questions.tasks=[fact]"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The same on prose that Python brings: the embedded text takes half a minute to make."""
    folder = tmp_path_factory.mktemp("prose")
    for name, text in topics.items():
        if len(text) > 1500:
            (folder / f"{name}.md").write_text(text)
    return [*TINY, f"data.path={folder}"]


def test_questions_have_their_weight_in_the_loss_and_reach_the_gistnet(tiny):
    parts = {}
    for weight in (0.0, 0.5, 1.0):
        torch.manual_seed(0)
        stage, batch = built([*tiny, *ASKED, f"loss.questions.weight={weight}", f"loss.block.weight={1 - weight}"])
        logged = {}
        stage.log = lambda name, value, logged=logged, **kwargs: logged.update({name: value})
        parts[weight] = stage.training_step(batch, 0)
        assert ("contexts" in batch) == ("train/questions/right" in logged) == (weight > 0)
    torch.testing.assert_close(parts[0.5], 0.5 * parts[0.0] + 0.5 * parts[1.0], rtol=1e-4, atol=1e-6)
    parts[1.0].backward()
    assert any(p.grad is not None and p.grad.any() for p in stage.main.parameters())


def test_questions_leave_the_rest_of_a_batch_as_it_was_and_are_a_function_of_the_seed(tiny):
    plain = built(tiny)[1]
    one, two, other = (built([*tiny, *ASKED, "loss.questions.weight=0.5", f"seed={seed}"])[1] for seed in (0, 0, 1))
    assert all(torch.equal(one[key], plain[key]) for key in ("ids", "block_starts"))
    assert torch.equal(one["contexts"], two["contexts"]) and not torch.equal(one["contexts"], other["contexts"])


def test_a_run_says_how_many_held_out_questions_are_right(tiny, tmp_path, capsys):
    given = [*tiny, *ASKED, "loss.questions.weight=0.5", "preset.warmup=1", "preset.validate_every=2", "trainer=cpu"]
    given += [
        "preset.validation_documents=1",
        "preset.report.blocks=4",
        "preset.report.copies=0",
        "preset.minutes=null",
    ]
    given += ["preset.report.level2=0", "stage.evaluate.controls=false"]
    assert run([*given, "preset.steps=4", f"folder={tmp_path / 'one'}"]) == 0
    said = capsys.readouterr().out
    assert (
        "Of 2 held-out questions " in said and " behind those of another one " in said and "studies.ladder" not in said
    )
    rows = list(csv.DictReader((tmp_path / "one" / "metrics.csv").open()))
    said = [(float(row["val/questions/nll"]), float(row["val/questions/right"])) for row in rows if row["val/dnll"]]
    assert len(said) == 2 and all(nll > 0 and 0 <= right <= 1 for nll, right in said)
    for row in rows:  # what the best checkpoint is chosen by
        if row["val/dnll"]:
            both = 1.0 * float(row["val/dnll"]) + 0.5 * float(row["val/questions/nll"])
            assert float(row["val/loss"]) == pytest.approx(both, rel=1e-4)
    best = torch.load(tmp_path / "one" / "checkpoints" / "best.ckpt", weights_only=True)
    lowest = min(float(row["val/loss"]) for row in rows if row["val/loss"])
    kept = next(state for name, state in best["callbacks"].items() if "best_model_score" in str(state))
    assert float(kept["best_model_score"]) == pytest.approx(lowest, rel=1e-4)


@pytest.mark.parametrize(
    "given, message",
    [
        ("loss.questions.tokens=[100]", "loss.questions.tokens=100 is not allowed: a multiple of block_size=32"),
        (
            "loss.questions.tasks=[riddle]",
            "loss.questions.tasks=['riddle']: allowed is a list, each fact or niah_single_1",
        ),
        ("loss.questions.framed=2", "loss.questions.framed=2"),
        (
            "loss.questions.tokens=[]",
            "loss.questions.tokens=[], loss.questions.tasks=['fact']: allowed is at least one",
        ),
        (
            "loss.questions.tokens=[32,8192]",
            "loss.questions.tokens=[32, 8192] is not allowed: with its question a context",
        ),
        ("gistnet.slots=2", "loss.questions.weight=0.5 is not allowed with gistnet, which makes several vectors"),
    ],
)
def test_questions_that_cannot_be_asked_end_a_run_with_one_message(given, message, tiny, tmp_path, capsys):
    assert run([*tiny, *ASKED, "loss.questions.weight=0.5", given, f"folder={tmp_path / 'run'}", "trainer=cpu"]) == 2
    assert message in capsys.readouterr().err


def test_a_stage_begins_with_a_saved_gistnet_and_refuses_one_of_another_shape(tiny):
    stage = built(tiny)[0]
    assert "asset:tiny-gistnet" in stage.start_from("asset:tiny-gistnet")
    saved = load_gistnet(resolve("asset:tiny-gistnet", "stage.init"), stage.base).state_dict()
    assert all(torch.equal(value, saved[key]) for key, value in stage.main.state_dict().items())
    elsewhere = built([*tiny, "gistnet.position=centre"])[0]  # tensors say nothing of that
    assert "gistnet.position: end -> centre" in elsewhere.start_from("asset:tiny-gistnet")
    other = built([*tiny, "gistnet.head=linear", "depth=d1"])[0]
    with pytest.raises(ValueError, match="stage.init=asset:tiny-gistnet: its GistNet has another architecture: "):
        other.start_from("asset:tiny-gistnet")
    with pytest.raises(ValueError, match="stage.init=.*smollm2-gistnet was trained with another base LM"):
        stage.start_from("asset:smollm2-gistnet")


def test_texts_without_prose_name_the_loss_that_wants_it(tiny, tmp_path, capsys):
    for number in range(60):
        (tmp_path / f"code_{number}.py").write_text(f"x_{number} = [{number}]\n" * 300)
    given = [*tiny, f"data.path={tmp_path}", "data.weights={narrative: 0, code: 1, structured: 0}"]
    given += [*ASKED, "loss.questions.weight=0.5", f"folder={tmp_path / 'run'}", "trainer=cpu"]
    assert run(given) == 2
    assert "loss.questions.weight=0.5 needs prose between the facts" in capsys.readouterr().err
