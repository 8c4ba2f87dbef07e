"""The base LM's own stage: what is trained how, and the folder that it leaves."""

from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from megactx.data.pretraining_module import PretrainingData
from megactx.framework.app import run
from megactx.framework.optimizers import MuonWithAdamW, warmup_cosine, warmup_stable_decay
from megactx.framework.run import pace
from megactx.lm import BaseLM
from megactx.stages.base_lm import BaseLMStage

CONFIG = dict(model_type="llama", vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
CONFIG |= dict(num_attention_heads=2, max_position_embeddings=256, tie_word_embeddings=True)
SETTINGS = dict(
    weights=None,
    muon_lr=0.02,
    adamw_lr=3e-3,
    weight_decay=0.1,
    warmup=2,
    decay=0.2,
    max_steps=10,
    card={},
    evaluate={"documents": 6},
)


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
    with pytest.raises(ValueError, match="^stage.weights=asset:nothing: "):
        BaseLMStage(CONFIG, **SETTINGS | {"weights": "asset:nothing"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rope_theta": 500000.0}, r"rope_parameters.rope_theta: 10000.0 -> 500000.0"),
        ({"rms_norm_eps": 1e-2}, "rms_norm_eps: 1e-06 -> 0.01"),
        ({"hidden_act": "gelu"}, "hidden_act: silu -> gelu"),
        ({"num_attention_heads": 4, "head_dim": 8, "num_key_value_heads": 4}, "num_attention_heads: 2 -> 4"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type: default -> linear"),
    ],
)
def test_weights_are_refused_where_the_config_makes_another_function_of_them(tmp_path, tiny_tokenizer, change, said):
    BaseLM.from_config(CONFIG).model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"stage.weights=.* are not of stage.config.*{said}"):
        BaseLMStage(CONFIG | change, **SETTINGS | {"weights": str(tmp_path)})


def test_an_untied_checkpoint_does_not_load_into_a_tied_model(tmp_path, tiny_tokenizer):
    BaseLM.from_config(CONFIG | {"tie_word_embeddings": False}).model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="stage.weights=.*tie_word_embeddings: False -> True"):
        BaseLMStage(CONFIG, **SETTINGS | {"weights": str(tmp_path)})


def test_weights_load_where_only_their_length_their_dropout_and_their_special_ids_differ(tmp_path, tiny_tokenizer):
    BaseLM.from_config(CONFIG | {"pad_token_id": 1}).model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    longer = CONFIG | {"max_position_embeddings": 512, "attention_dropout": 0.1, "bos_token_id": 0}
    assert BaseLMStage(longer, **SETTINGS | {"weights": str(tmp_path)}).base.max_positions == 512


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


@pytest.fixture(scope="module")
def pretraining(tiny_tokenizer):
    """Batches of windows whose length grows, served to a trainer that accumulates two of them."""
    from datasets import Dataset

    rows = [{"text": " ".join(f"the fox {i * n} jumps" for i in range(120)), "domain": "narrative"} for n in range(60)]

    class Source:
        def fingerprint(self):
            return "foxes"

        def load(self):
            return Dataset.from_list([row | {"source": str(index)} for index, row in enumerate(rows)])

    phases = [dict(steps=2, tokens=128, batch=2), dict(steps=9, tokens=256, batch=1)]
    data = PretrainingData(Source(), tiny_tokenizer, phases, {"narrative": 1.0}, 0.4, 0.0, 512)
    data.trainer = SimpleNamespace(accumulate_grad_batches=2, world_size=1, global_rank=0)
    data.setup()
    return data


def test_a_phase_lasts_its_steps_however_many_batches_a_step_accumulates(pretraining):
    shapes = [pretraining.training[index]["ids"].shape for index in range(6)]
    assert shapes == [(2, 128)] * 4 + [(1, 256)] * 2
    assert [pretraining.tokens(steps) for steps in (1, 2, 3)] == [512, 1024, 1536]  # what those batches hold


def test_validation_has_windows_of_the_last_phase(pretraining):
    assert pretraining.validation[0]["ids"].shape == (1, 256)


def test_special_ids_come_from_the_tokenizer_and_no_row_of_the_embeddings_is_left_out(tiny_tokenizer):
    module = BaseLMStage(CONFIG | {"pad_token_id": 5, "bos_token_id": 7}, **SETTINGS)
    module.prepare(SimpleNamespace(tokenizer=tiny_tokenizer, limit_to=int))
    config = module.base.config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, None, 1)
    assert module.base.model.generation_config.pad_token_id == 1
    module.loss_per_token(torch.tensor([[0, 5, 1, 9]]), torch.arange(4)[None]).sum().backward()
    assert (module.base.model.get_input_embeddings().weight.grad[[0, 1, 5]].abs().amax(1) > 0).all()


def test_an_id_that_texts_have_is_not_that_of_padding(tiny_tokenizer):
    from copy import deepcopy

    tokenizer = deepcopy(tiny_tokenizer)
    tokenizer.pad_token = tokenizer.bos_token  # as many take it: the id that opens every document
    module = stage()
    module.prepare(SimpleNamespace(tokenizer=tokenizer, limit_to=int))
    assert module.base.config.bos_token_id == 0 and module.base.config.pad_token_id is None


@pytest.mark.slow
def test_a_run_with_a_time_goes_on_with_the_phases_that_time_has_left(
    base_folder, texts, tmp_path, monkeypatch, dies_at, capsys
):
    """On a machine that is faster by now, in the folder that ``resume=auto`` finds by the settings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pace, "_try", lambda cfg, device: (1.0, 0.0))
    size = "{model_type:llama,vocab_size:512,hidden_size:32,intermediate_size:64,num_hidden_layers:1"
    size += ",num_attention_heads:2,num_key_value_heads:2,max_position_embeddings:1024}"
    arguments = ["experiment=base_lm", "data=files", f"data.path={texts}", f"base.name={base_folder}", "trainer=cpu"]
    arguments += [f"stage.config={size}", "preset.minutes=0.15", "preset.validate_every=2000"]
    arguments += ["datamodule.weights={narrative: 1, code: 1, structured: 0}", "preset.report.card=2"]
    dies_at(BaseLMStage, "finish", 1)
    assert run(arguments) == 3
    monkeypatch.setattr(pace, "_try", lambda cfg, device: (0.1, 0.0))
    assert run([*arguments, "resume=auto"]) == 0, capsys.readouterr().err
    (folder,) = (tmp_path / "runs").glob("*/*")
    cfg = OmegaConf.load(folder / "config.yaml")
    assert cfg.preset.steps == 8 and [phase.steps for phase in cfg.datamodule.phases] == [6, 1, 1]
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 8
