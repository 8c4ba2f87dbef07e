"""Models from the package, an export, a run, a plain model; and what does not belong together."""

import json
import shutil

import pytest
import torch

from megactx.runtime import Controller, Session, Settings, load_models


def assert_same(one, other):
    for part in ("base", "gistnet", "lensnet"):
        own, theirs = getattr(one, part).state_dict(), getattr(other, part).state_dict()
        assert own.keys() == theirs.keys()
        for name in own:
            assert torch.allclose(own[name], theirs[name], rtol=1e-2), name


def test_the_embedded_models_are_there_and_frozen():
    models = load_models(device="cpu")
    assert models.gistnet is not None and models.base.tokenizer is not None
    parts = [part for part in (models.base, models.gistnet, models.lensnet) if part is not None]
    assert not any(p.requires_grad for part in parts for p in part.parameters())
    assert not any(part.training for part in parts)
    Controller(models, Settings())  # the defaults fit them


def test_an_export_comes_back(models, exported):
    assert_same(load_models(str(exported), "cpu"), models)


def test_an_export_without_a_lensnet_has_none(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "own")
    shutil.rmtree(tmp_path / "own" / "lensnet")
    assert load_models(str(tmp_path / "own"), "cpu").lensnet is None


def test_a_gistnet_of_another_base_is_refused(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "own")
    about = json.loads((tmp_path / "own" / "gistnet" / "gistnet.json").read_text())
    (tmp_path / "own" / "gistnet" / "gistnet.json").write_text(json.dumps(about | {"base": "0"}))
    with pytest.raises(ValueError, match="was trained with another base LM"):
        load_models(str(tmp_path / "own"), "cpu")


def test_a_plain_model_serves_only_without_megacontext(base_folder):
    models = load_models(str(base_folder), "cpu")
    assert models.gistnet is None
    Controller(models, Settings(megacontext="none"))
    with pytest.raises(ValueError, match="there is no GistNet"):
        Controller(models, Settings())


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(ValueError, match="^model=.*nowhere: there is no such folder"):
        load_models(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="^--model=nowhere: there is no such folder"):
        load_models("nowhere", setting="--model")
    with pytest.raises(ValueError, match="there is no checkpoint"):
        load_models(str(tmp_path))


@pytest.mark.slow
def test_a_run_of_a_gist_stage_and_of_a_lens_stage_can_be_talked_to(gist_run, base_folder, texts, tmp_path):
    from megactx.framework.app import run

    assert run([*gist_run, "block_size=8"]) == 0
    folder = tmp_path / "lens"
    lens = [
        *["experiment=lens", "preset=demo", "data=files", f"data.path={texts}", f"base.name={base_folder}"],
        *[f"stage.gistnet={tmp_path / 'run'}", "data.weights={narrative: 0.5, code: 0.5, structured: 0}"],
        *["block_size=8", "horizon.tokens=8", "lensnet.num_heads=4", "preset.steps=2", "preset.warmup=1"],
        *["preset.validate_every=2", "datamodule.min_tokens=300", "datamodule.max_tokens=400", "datamodule.batch=2"],
        *["datamodule.validation_windows=3", "stage.budgets=[0.6, 0.7]", "stage.windows.per_round=2"],
        *["stage.windows.rounds=1", "stage.windows.edits=6", "stage.evaluate.documents=2", "stage.evaluate.oracle=1"],
        *["stage.evaluate.tokens=300", "stage.evaluate.budgets=[0.6, 0.7]", "stage.evaluate.planted=2"],
        *["trainer=cpu", "trainer.precision=32-true", f"folder={folder}"],
    ]
    assert run(lens) == 0
    gists, all_three = load_models(str(tmp_path / "run"), "cpu"), load_models(str(folder), "cpu")
    assert gists.lensnet is None and all_three.lensnet is not None
    for name, value in gists.gistnet.state_dict().items():
        assert torch.equal(value, all_three.gistnet.state_dict()[name])
    session = Session(Controller(all_three, Settings(budget=200, allocator={"protected": 16})))
    session.append("def read(path):\n" * 60)
    assert len(list(session.generate(10))) == 10


def test_a_gguf_file_is_a_plain_base(base_folder, tiny_tokenizer, tmp_path, capsys):
    pytest.importorskip("gguf", reason="the extra megactx[gguf] is not installed")
    from tiny_gguf import write_gguf
    from transformers import AutoModelForCausalLM

    from megactx.apps import generate

    own = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    path = write_gguf(tmp_path / "small.gguf", own, tiny_tokenizer)
    for name in (path, tmp_path):
        models = load_models(str(name), "cpu")
        assert models.gistnet is None and models.name == str(name) and models.base.tokenizer is not None
    arguments = ["return", "--tokens", "8", "--megacontext", "recency", "--model"]
    told = []
    for name in (path, base_folder):
        assert generate.main([*arguments, str(name)]) == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1]


def test_a_base_of_the_package_goes_by_its_name(monkeypatch):
    assert load_models("tiny-base", "cpu").gistnet is None and load_models("asset:tiny-base", "cpu").base.width == 256
    monkeypatch.setattr("megactx.assets.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="^model=asset:smollm2: it is not installed, .* has it .make smollm2"):
        load_models("smollm2", "cpu")
