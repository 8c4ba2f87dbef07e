"""Base training with gists from the start: what is read, what is scored, and what a run leaves."""

import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from megactx.framework.app import run
from megactx.stages.base_gists import DROPPED, GISTS, drawn_cut, nll_behind
from megactx.stages.base_lm import BaseLMStage

from .test_base_lm_stage import CONFIG, SETTINGS

K, T, CUT = 4, 24, 12
GISTNET = {"block_size": K, "num_heads": 4}


def stage(**changes) -> BaseLMStage:
    torch.manual_seed(0)
    module = BaseLMStage(CONFIG, **SETTINGS | {"gists": 1.0, "gistnet": GISTNET} | changes)
    for parameter in module.nets.parameters():  # a fresh gist is nearly the last token: see that it is more
        parameter.data += 0.1 * torch.randn_like(parameter)
    return module


@pytest.fixture
def batch():
    torch.manual_seed(1)
    positions = torch.arange(T).expand(2, -1).clone()
    positions[1, 7:] += 50  # a skip inside a block
    return {"ids": torch.randint(2, 512, (2, T)), "positions": positions}


@pytest.mark.parametrize("position", ["end", "centre"])
@pytest.mark.parametrize("older", [GISTS, DROPPED])
def test_each_token_behind_gists_costs_what_a_plain_loop_over_embeddings_finds(batch, older, position):
    module = stage(gistnet=GISTNET | {"position": position})
    base, net = module.base, module.nets["gistnet"]
    with torch.no_grad():
        nll, told = nll_behind(base, net, batch, CUT, older)
        assert told.tolist() == [*range(1, K), *range(CUT, T)]
        for row, (ids, positions) in enumerate(zip(batch["ids"], batch["positions"], strict=True)):
            embedded, sequence, places = base.embed(ids[None])[0], [], []
            for t in range(T):
                block, inside = divmod(t, K)
                if block == 0 or t >= CUT:
                    sequence.append(embedded[t])
                    places.append(positions[t])
                elif older == GISTS and inside == 0:
                    sequence.append(net.encode_block(embedded[None, t : t + K])[0])
                    places.append(positions[t + net.offset_in(K)])
            out = base.model(inputs_embeds=torch.stack(sequence)[None], position_ids=torch.stack(places)[None])
            for token, found in zip(told.tolist(), nll[row], strict=True):
                at = token - 1 if token < K else len(sequence) - (T - token) - 1
                expected = F.cross_entropy(out.logits[0, at], ids[token])
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_both_learn_from_what_stands_behind_gists_and_gists_keep_the_scale_of_the_embeddings_of_now(batch):
    module = stage()
    with torch.no_grad():
        module.base.model.get_input_embeddings().weight.mul_(3)
    nll_behind(module.base, module.nets["gistnet"], batch, CUT, GISTS)[0].sum().backward()
    assert module.nets["gistnet"].embedding_rms == module.base.embedding_rms()
    for part in (module.base, module.nets):
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in part.parameters())


def test_a_cut_lies_on_the_grid_behind_the_sink_and_before_the_end():
    cuts = {drawn_cut(random.Random(n), 512, 32) for n in range(200)}
    assert cuts == {32 * n for n in range(4, 13)}
    assert {drawn_cut(random.Random(n), 128, 32) for n in range(50)} == {64, 96}


def test_all_of_both_is_in_the_optimizer_and_without_gists_there_is_no_gistnet():
    module = stage()
    groups = module.configure_optimizers()["optimizer"].param_groups
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in module.parameters()}
    assert not BaseLMStage(CONFIG, **SETTINGS).nets


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"slots": 2}, "gistnet.slots=2 is not allowed with stage.gists: 1"),
        ({"context": 8}, "gistnet.context=8 is not allowed with stage.gists: 0"),
        ({"input": "hidden"}, "gistnet.input=hidden are not allowed with stage.gists"),
    ],
)
def test_a_gistnet_that_wants_more_than_embeddings_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        stage(gistnet=GISTNET | settings)


def test_a_window_must_have_room_for_gists_and_for_what_they_are_for(tiny_tokenizer):
    data = SimpleNamespace(tokenizer=tiny_tokenizer, limit_to=int, phases=[{"tokens": 4 * K}, {"tokens": 4 * K - 1}])
    with pytest.raises(ValueError, match="datamodule.phases: tokens=15 is not allowed with stage.gists: at least 4"):
        stage().prepare(data)


@pytest.mark.slow
def test_a_run_goes_on_to_the_same_weights_and_a_gist_stage_goes_on_with_its_gistnet(
    base_folder, texts, tmp_path, dies_at, capsys
):
    size = "{model_type:llama,vocab_size:512,hidden_size:32,intermediate_size:64,num_hidden_layers:1"
    size += ",num_attention_heads:2,num_key_value_heads:2,max_position_embeddings:1024}"
    common = ["data=files", f"data.path={texts}", "trainer=cpu", "data.weights={narrative: 1, code: 1, structured: 0}"]
    common += ["block_size=8", "gistnet.num_heads=4", "preset.warmup=1"]
    arguments = [*common, "experiment=base_lm", f"base.name={base_folder}", f"stage.config={size}", "stage.gists=0.5"]
    arguments += ["preset.validate_every=2", "datamodule.phases=[{steps:9,tokens:128,batch:2}]"]
    arguments += ["datamodule.weights={narrative: 1, code: 1, structured: 0}"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    arguments += ["preset.steps=6"]
    assert run([*arguments, f"folder={whole}"]) == 0
    dies_at(BaseLMStage, "training_step", 5)
    assert run([*arguments, f"folder={parts}"]) == 3
    assert run([*arguments, f"folder={parts}", "resume=auto"]) == 0

    def states(folder):
        return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]

    first, second = states(whole), states(parts)
    assert any(name.startswith("nets.gistnet.") for name in first)
    assert all(torch.equal(first[name], second[name]) for name in first)
    table = (whole / "metrics.csv").read_text().splitlines()
    assert {"train/nll_gists", "val/dnll_gists", "val/dnll_dropped"} <= set(table[0].split(","))

    gist = [*common, "experiment=gist_stage1", f"base.name={whole / 'model'}", f"stage.init={whole}"]
    gist += ["preset.steps=1", "preset.validate_every=1", "preset.minutes=null", "horizon.tokens=8"]
    gist += ["datamodule.min_tokens=100", "datamodule.max_tokens=128"]
    gist += ["preset.report.blocks=8", "preset.report.copies=0", "preset.report.level2=0"]
    assert run([*gist, f"folder={tmp_path / 'gist'}"]) == 0
    assert "step 6: gistnet" in capsys.readouterr().out
