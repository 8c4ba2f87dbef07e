"""A run as a plain Hugging Face folder: the very logits of the merged model, and all parts beside it."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megactx.framework.app import run
from megactx.lm import BaseLM
from megactx.parts.read import load_gistnet, load_lensnet
from megactx.stages.export import MANIFEST, load_run, main, plain_base

SHORT = ["stage.evaluate.documents=2", "preset.validate_every=2", "stage.lora.rank=4", "stage.base_lr=0.05"]
RUNS = {
    "alternating": [
        *["experiment=alternating", "stage.cycles=1", "stage.steps={gist: 1, lens: 0, lora: 3}", "datamodule.spans=3"],
        *SHORT,
    ],
    "end_to_end": [
        *["experiment=end_to_end", "preset.steps=2", "stage.windows={sources: 1, variants: 2, per_pass: 2}"],
        *["stage.train_base=lora", "stage.lora.embeddings=true", "stage.lora.layers=first_two", *SHORT],
    ],
}


@pytest.fixture(scope="module", params=RUNS)
def exported(request, joint_settings, tmp_path_factory):
    """-> (run folder, export)"""
    folder = tmp_path_factory.mktemp(request.param)
    assert run([*joint_settings, *RUNS[request.param], f"folder={folder / 'run'}"]) == 0
    assert main([str(folder / "run"), str(folder / "out")]) == 0
    return folder / "run", folder / "out"


@torch.no_grad()
@pytest.mark.slow
def test_plain_transformers_load_it_and_the_logits_are_those_of_the_merged_model(exported):
    run_folder, out = exported
    stage, _ = load_run(run_folder)
    ids = torch.randint(2, 512, (2, 40), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(out, attn_implementation="sdpa")
    loaded, together = model(input_ids=ids).logits, plain_base(stage).model(input_ids=ids).logits
    assert torch.equal(loaded, together)
    base = stage.base
    apart = base.logits(base(base.embed(ids), None))
    torch.testing.assert_close(loaded, apart, rtol=0, atol=1e-4)
    with stage.original() as original:
        untouched = original.logits(original(original.embed(ids), None))
    assert (untouched - apart).abs().max() > 1e-2, "the adapters change something"
    assert not any("lora" in name for name in model.state_dict())
    assert AutoTokenizer.from_pretrained(out)("x = 1").input_ids


@torch.no_grad()
@pytest.mark.slow
def test_the_parts_lie_beside_it_and_the_manifest_says_what_they_are(exported):
    run_folder, out = exported
    stage, _ = load_run(run_folder)
    base = BaseLM.from_pretrained(str(out)).freeze()
    gistnet = load_gistnet(out / "gistnet", base)
    lens = load_lensnet(out / "lensnet", gistnet)
    for mine, theirs in ((gistnet, stage.gistnet), (lens, stage.lens)):
        for name, value in theirs.state_dict().items():
            torch.testing.assert_close(mine.state_dict()[name], value, rtol=1e-2, atol=1e-2)
    manifest = json.loads((out / MANIFEST).read_text())
    assert manifest["adapter_parameters"] == manifest["measured"]["adapter_parameters"] > 0
    assert manifest["measured"]["perplexity_after"] > 0 and manifest["tokens"] > 0
    assert {"model.safetensors", "gistnet/model.safetensors", "lensnet/model.safetensors"} <= set(manifest["files"])


@pytest.mark.slow
def test_an_export_takes_the_place_of_another_and_of_nothing_else(exported, tmp_path, capsys):
    run_folder, out = exported
    assert main([str(run_folder), str(out)]) == 0
    assert "adapter parameters" in capsys.readouterr().out
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert main([str(run_folder), str(tmp_path / "mine")]) == 2
    assert "holds something that is no export" in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.txt").exists()
    assert main([str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 2
    assert "there is no such run folder or checkpoint" in capsys.readouterr().err
