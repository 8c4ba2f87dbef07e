"""Checkpoints know the base LM that they were trained with: resume refuses another one, ``stage.init`` says so."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from megactx.framework.config.search_path import compose
from megactx.framework.run.resume import check_fits
from megactx.lm import BaseLM
from megactx.memory.encoding import identity_of_base
from megactx.memory.pyramid import PLAIN
from megactx.parts.read import gistnet_of
from megactx.stages.gist import GistStage
from megactx.stages.joint import JointStage
from megactx.stages.lens import LensStage
from megactx.stages.stage import FrozenBaseStage

GISTNET = dict(block_size=8, layers=1, num_heads=4, dropout=0.0)
SETTINGS = dict(controls={}, horizon=8, losses={"block": {}}, lr=1e-3)
SETTINGS |= dict(muon_lr=None, min_lr=1e-6, weight_decay=0.01, warmup=1, max_steps=4, targets={})
SETTINGS |= dict(evaluate={"reconstruction": 0})


@pytest.fixture(scope="module")
def bases(base_folder, tiny_tokenizer, tmp_path_factory):
    """name -> folder: a base LM, one of the same shapes with other weights, and one of another width."""
    found = {"one": str(base_folder)}
    config = dict(model_type="llama", vocab_size=512, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    for seed, (name, width) in enumerate({"other": 32, "wide": 64}.items()):
        torch.manual_seed(10 + seed)
        folder = tmp_path_factory.mktemp(name)
        BaseLM.from_config(config | dict(hidden_size=width, max_position_embeddings=512)).model.save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        found[name] = str(folder)
    return found


def gist(base: str, **gistnet) -> GistStage:
    return GistStage(base={"name": base, "dtype": "float32"}, gistnet=GISTNET | gistnet, **SETTINGS)


def save(stage, path) -> str:
    checkpoint = {"state_dict": dict(stage.state_dict()), "hyper_parameters": dict(stage.hparams), "global_step": 4}
    stage.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)
    return str(path)


@pytest.fixture
def trained(bases, tmp_path):
    return save(gist(bases["one"]), tmp_path / "one.ckpt")


def test_a_checkpoint_holds_the_identity_of_its_base_as_trees_have_it(bases, trained):
    said = torch.load(trained, weights_only=True)["base"]
    assert said["embeddings"] == identity_of_base(BaseLM.from_pretrained(bases["one"])) and said["width"] == 32
    assert check_fits(gist(bases["one"]), trained)["global_step"] == 4


def test_resume_refuses_another_base_of_the_same_width(bases, trained):
    with pytest.raises(ValueError, match=r"resume=.*another base LM: .*width 32, this one is .*other embeddings"):
        check_fits(gist(bases["other"]), trained)


def test_resume_names_base_and_width_first_and_nothing_that_holds_no_weights(bases, trained):
    with pytest.raises(ValueError) as error:
        check_fits(gist(bases["wide"], dropout=0.1), trained)
    said = str(error.value)
    assert f"another base LM: {bases['one']} of width 32, this one is {bases['wide']} of width 64" in said
    assert "dropout" not in said
    with pytest.raises(ValueError) as error:
        check_fits(gist(bases["one"], dropout=0.1, layers=2, position="centre"), trained)
    assert "stage.gistnet.layers: 1 -> 2 (" in str(error.value) and "dropout" not in str(error.value)
    assert "position" not in str(error.value)


def test_init_takes_weights_of_another_base_and_says_so(bases, trained):
    assert "another base" not in gist(bases["one"]).start_from(trained)
    said = gist(bases["other"]).start_from(trained)
    assert said.startswith("Starting from") and "another base LM" in said and bases["one"] in said


def test_init_names_base_and_width_first_where_the_architecture_differs(bases, trained):
    with pytest.raises(ValueError) as error:
        gist(bases["wide"], dropout=0.1).start_from(trained)
    said = str(error.value)
    assert said.index("of width 32") < said.index("of width 64") and "dropout" not in said
    with pytest.raises(ValueError, match=r"another architecture: gistnet.layers: 1 -> 2$"):
        gist(bases["one"], dropout=0.1, layers=2).start_from(trained)


def test_init_tells_settings_that_make_another_function_of_the_same_weights(bases, trained):
    assert "gistnet.num_heads: 4 -> 2" in gist(bases["one"], num_heads=2).start_from(trained)


def test_init_names_itself_where_there_is_no_checkpoint(bases, tmp_path):
    (tmp_path / "config.yaml").write_text("a: 1\n")
    stage = gist(bases["one"])
    for path in (tmp_path / "config.yaml", tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=f"^stage.init={path}: ") as error:
            stage.start_from(str(path))
        assert "resume=" not in str(error.value)


def test_a_gistnet_of_a_checkpoint_is_refused_with_another_base(bases, trained):
    assert gistnet_of(trained, BaseLM.from_pretrained(bases["one"])).block_size == 8
    with pytest.raises(ValueError, match="gistnet=.*another base LM"):
        gistnet_of(trained, BaseLM.from_pretrained(bases["other"]))


def test_joint_stages_know_their_base_too(joint_settings, bases, tmp_path):
    def stage(base: str, *more: str):
        asked = ["experiment=end_to_end", *joint_settings, "stage.lora.rank=0", *more]
        return instantiate(compose([*asked, f"base.name={base}"]).stage, _convert_="all")

    mine = stage(bases["one"])
    path = save(mine, tmp_path / "joint.ckpt")
    own = tmp_path / "net"  # the GistNet of the settings is of the first base
    from megactx.parts.write import save_gistnet

    other = BaseLM.from_pretrained(bases["other"])
    save_gistnet(mine.gistnet, {"block_size": 8, "num_heads": 4, "dropout": 0.1}, other, own)
    theirs = stage(bases["other"], f"stage.gistnet={own}")
    with pytest.raises(ValueError, match="resume=.*another base LM"):
        check_fits(theirs, path)
    assert "another base LM" in theirs.start_from(path)
    with pytest.raises(InstantiationException, match="stage.lens=.*another base LM"):
        stage(bases["other"], f"stage.gistnet={own}", f"stage.lens={path}")


def test_a_base_that_differs_in_its_layers_only_is_another_base(bases, trained, tmp_path):
    base = BaseLM.from_pretrained(bases["one"])
    with torch.no_grad():
        base.model.get_decoder().layers[0].mlp.up_proj.weight.mul_(1.1)
    base.model.save_pretrained(tmp_path / "tuned")
    base.tokenizer.save_pretrained(tmp_path / "tuned")
    with pytest.raises(ValueError, match="resume=.*another base LM: .*with other layers"):
        check_fits(gist(str(tmp_path / "tuned")), trained)
    saved = torch.load(trained, weights_only=True)
    del saved["base"]["weights"]  # of earlier days
    torch.save(saved, trained)
    assert check_fits(gist(str(tmp_path / "tuned")), trained)["global_step"] == 4


@pytest.mark.parametrize("kind", [GistStage, LensStage, JointStage])
def test_a_training_says_what_sessions_need_where_the_base_takes_few_positions(bases, caplog, kind):
    base = BaseLM.from_pretrained(bases["one"])
    net = SimpleNamespace(block_size=32, levels=1)
    stage = SimpleNamespace(base=base, gistnet=net, main=net, hparams=SimpleNamespace(horizon=8), attention=PLAIN)
    stage.fit_data, stage.loss_settings = partial(FrozenBaseStage.fit_data, stage), lambda name: {}
    ignored = {name: lambda _: None for name in ("limit_to", "begin_at")}
    data = SimpleNamespace(block=32, horizon=8, level2_spans=0, **ignored)
    for positions, said in ((512, "the newest 64 tokens stay"), (256, "need at least"), (2048, "")):
        base.config.max_position_embeddings = positions
        caplog.clear()
        kind.prepare(stage, data)
        assert [said in line for line in caplog.messages] == [True] * bool(said)


def test_a_checkpoint_with_lora_on_the_embeddings_holds_the_adapters_and_no_whole_matrix(joint_settings, tmp_path):
    asked = ["experiment=end_to_end", *joint_settings, "stage.train_base=lora", "stage.lora.embeddings=true"]
    stage = instantiate(compose(asked).stage, _convert_="all")
    saved = torch.load(save(stage, tmp_path / "lora.ckpt"), weights_only=True)["state_dict"]
    names = [name for name in saved if name.startswith("base.")]
    assert any("lora_embedding_A" in name for name in names) and all("lora_" in name for name in names)
