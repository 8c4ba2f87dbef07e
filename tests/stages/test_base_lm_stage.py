"""The base LM's own stage: what is trained how, and the folder that it leaves."""

import pytest
import torch

from megactx.framework.app import run
from megactx.framework.optimizers import MuonWithAdamW, warmup_cosine, warmup_stable_decay
from megactx.lm import BaseLM
from megactx.stages.base_lm import BaseLMStage

CONFIG = dict(model_type="llama", vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
CONFIG |= dict(num_attention_heads=2, max_position_embeddings=256, tie_word_embeddings=True)
SETTINGS = dict(weights=None, muon_lr=0.02, adamw_lr=3e-3, weight_decay=0.1, warmup=2, decay=0.2, max_steps=10, card={})


def stage() -> BaseLMStage:
    torch.manual_seed(0)
    return BaseLMStage(CONFIG, **SETTINGS)


def test_training_goes_on_from_the_weights_of_an_earlier_base_and_refuses_those_of_another_config(
    tmp_path, tiny_tokenizer
):
    torch.manual_seed(1)
    BaseLM.from_config(CONFIG).model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    begun = BaseLMStage(CONFIG, **SETTINGS | {"weights": str(tmp_path)}).base.model.state_dict()
    wanted = BaseLM.from_pretrained(str(tmp_path)).model.state_dict()
    assert all(torch.equal(begun[name], wanted[name]) for name in wanted)
    with pytest.raises(ValueError, match="stage.weights=.* are not of stage.config: 6 tensors"):
        BaseLMStage(CONFIG | {"intermediate_size": 48}, **SETTINGS | {"weights": str(tmp_path)})


def test_matrices_go_to_muon_embeddings_and_vectors_to_adamw_and_nothing_is_left_out():
    module = stage()
    optimizer = module.configure_optimizers()["optimizer"]
    muon, adamw = ({id(p) for group in part.param_groups for p in group["params"]} for part in optimizer.parts)
    embedding = module.base.model.get_input_embeddings().weight
    assert id(embedding) in adamw and not muon & adamw
    assert muon | adamw == {id(p) for p in module.parameters()}
    assert all(p.ndim == 2 for group in optimizer.parts[0].param_groups for p in group["params"])


def test_the_combined_optimizer_steps_like_its_parts_follows_a_schedule_and_restores_its_state():
    def made():
        torch.manual_seed(0)
        matrix, vector = torch.nn.Parameter(torch.randn(8, 4)), torch.nn.Parameter(torch.randn(4))
        optimizer = MuonWithAdamW(
            [
                {"params": [matrix], "lr": 0.1, "weight_decay": 0.1, "muon": True},
                {"params": [vector], "lr": 0.01, "weight_decay": 0.0},
            ]
        )
        return matrix, vector, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))

    def step(matrix, vector, optimizer, schedule):
        optimizer.zero_grad()
        (matrix @ vector).pow(2).sum().backward()
        optimizer.step()
        schedule.step()

    whole = made()
    for _ in range(4):
        step(*whole)
    assert [group["lr"] for group in whole[2].param_groups] == pytest.approx([0.1 / 5, 0.01 / 5])

    part = made()
    for _ in range(2):
        step(*part)
    other = made()
    other[0].data.copy_(part[0].data)
    other[1].data.copy_(part[1].data)
    other[2].load_state_dict(part[2].state_dict())
    other[3].load_state_dict(part[3].state_dict())
    for _ in range(2):
        step(*other)
    assert torch.equal(other[0], whole[0]) and torch.equal(other[1], whole[1])


def test_schedules_warm_up_stay_and_end_where_they_should():
    flat = [warmup_stable_decay(step, warmup=10, total=100, decay=0.2) for step in range(101)]
    assert flat[0] == 0.1 and flat[9] == 1.0 and flat[79] == 1.0 and flat[90] == pytest.approx(0.5) and flat[100] == 0
    cosine = [warmup_cosine(step, warmup=10, total=100, floor=0.01) for step in range(120)]
    assert cosine[9] == 1.0 and cosine[55] == pytest.approx(0.505) and cosine[100] == cosine[119] == pytest.approx(0.01)


def test_the_loss_of_a_token_is_its_cross_entropy_and_training_lowers_it():
    module = stage()
    ids = torch.randint(2, 512, (2, 40))
    positions = torch.arange(40).expand(2, -1)
    expected = module.base.model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(module.loss_per_token(ids, positions).mean(), expected)
    optimizer = module.configure_optimizers()["optimizer"]
    losses = []
    for _ in range(8):
        loss = module.loss_per_token(ids, positions).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.5


def test_a_jump_in_positions_changes_the_loss_but_cuts_nothing():
    module = stage()
    ids = torch.randint(2, 512, (1, 40))
    plain = torch.arange(40)[None]
    jumped = plain.clone()
    jumped[:, 20:] += 100
    moved = module.loss_per_token(ids, jumped)
    assert not torch.allclose(moved[:, 20:], module.loss_per_token(ids, plain)[:, 20:])
    changed = ids.clone()
    changed[:, 5] = 2 + (ids[:, 5] - 1) % 510
    assert not torch.equal(module.loss_per_token(changed, jumped)[:, 25:], moved[:, 25:])


def test_a_finished_run_leaves_a_model_folder_with_its_tokenizer_and_measured_card(
    base_folder, texts, tmp_path, capsys
):
    size = "{model_type:llama,vocab_size:512,hidden_size:32,intermediate_size:64,num_hidden_layers:1"
    size += ",num_attention_heads:2,num_key_value_heads:2,max_position_embeddings:1024"
    size += ",bos_token_id:0,eos_token_id:null,pad_token_id:1}"
    arguments = ["experiment=base_lm", "data=files", f"data.path={texts}", f"base.name={base_folder}"]
    arguments += [f"stage.config={size}", "preset.steps=3", "preset.warmup=1", "preset.validate_every=2"]
    arguments += ["datamodule.phases=[{steps:2,tokens:128,batch:2},{steps:9,tokens:256,batch:1}]"]
    arguments += [
        "datamodule.weights={narrative: 1, code: 1, structured: 0}",
        "trainer=cpu",
        f"folder={tmp_path / 'run'}",
    ]
    assert run(arguments) == 0, capsys.readouterr().err
    folder = tmp_path / "run" / "model"
    base = BaseLM.from_pretrained(str(folder))
    assert base.model.dtype == torch.bfloat16 and base.tokenizer.bos_token_id == 0
    trained = BaseLMStage.load_from_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    for name, p in trained.base.model.state_dict().items():
        torch.testing.assert_close(base.model.state_dict()[name].float(), p, rtol=1e-2, atol=1e-3)
    card = (folder / "README.md").read_text()
    assert "tokens seen: 768" in card  # 2 x 2 x 128 + 1 x 256
    for measure in (
        "Loss by position",
        "A passage the second time",
        "A block is missing",
        "The far context is missing",
    ):
        assert measure in card
    assert "Next: python train.py experiment=demo base.name=" in capsys.readouterr().out


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_refused(base_folder, texts, tmp_path, capsys):
    arguments = ["experiment=base_lm", "data=files", f"data.path={texts}", f"base.name={base_folder}", "trainer=cpu"]
    arguments += ["stage.config.vocab_size=300", f"folder={tmp_path / 'run'}"]
    assert run(arguments) == 2
    assert "stage.config.vocab_size=300 is too small" in capsys.readouterr().err
