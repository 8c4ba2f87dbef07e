"""What is written down of a base LM tells it from any other one."""

import pytest
import torch

from megactx.gist import GistNet
from megactx.lm import BaseLM, adapters
from megactx.lm.identity import of_embeddings, of_weights
from megactx.memory import MegaContextTree
from megactx.parts.read import load_gistnet
from megactx.parts.write import save_gistnet

SETTINGS = dict(block_size=8, num_heads=4)


def load(folder, dtype="float32"):
    return BaseLM.from_pretrained(str(folder), dtype).freeze()


def with_other_layers(base):
    torch.manual_seed(7)
    for name, parameter in base.named_parameters():
        if "layers" in name and parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.05)
    return base


def net_of(base, **more):
    torch.manual_seed(0)
    return GistNet(base.width, base.embedding_rms(), **SETTINGS | more).eval()


def test_bases_that_differ_in_their_layers_only_have_the_same_embeddings_and_other_weights(base_folder):
    one, other = load(base_folder), with_other_layers(load(base_folder))
    assert of_embeddings(one) == of_embeddings(other) and of_weights(one) != of_weights(other)
    assert of_weights(load(base_folder, "bfloat16")) == of_weights(one) == of_weights(one.twin())


@pytest.mark.parametrize("setting", ["rms_norm_eps", "num_attention_heads", "hidden_act"])
def test_a_setting_that_makes_another_function_of_the_same_weights_is_another_base(base_folder, setting):
    one, other = load(base_folder), load(base_folder)
    setattr(other.config, setting, {"rms_norm_eps": 0.1, "num_attention_heads": 4, "hidden_act": "gelu"}[setting])
    assert of_weights(one) != of_weights(other)


def test_adapters_on_any_layer_make_another_base_while_they_are_on(base_folder):
    base = load(base_folder)
    plain = of_weights(base)
    adapters.adapt(base, rank=4)
    assert of_weights(base) == plain
    for name, parameter in adapters.adapters_of(base).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert of_weights(base) != plain
    with adapters.switched_off(base):
        assert of_weights(base) == plain


def test_a_gistnet_is_refused_with_a_base_of_other_layers_and_with_adapted_embeddings(base_folder, tmp_path):
    base = load(base_folder)
    save_gistnet(net_of(base), SETTINGS, base, tmp_path / "net")
    assert load_gistnet(tmp_path / "net", load(base_folder, "bfloat16")).block_size == 8
    with pytest.raises(ValueError, match="another base LM .*has other layers"):
        load_gistnet(tmp_path / "net", with_other_layers(load(base_folder)))
    adapters.adapt(base, rank=4, embeddings=True)
    for parameter in adapters.adapters_of(base).values():
        torch.nn.init.normal_(parameter)
    with pytest.raises(ValueError, match="another base LM .*has other embeddings"):
        load_gistnet(tmp_path / "net", base)


def test_gistnets_of_earlier_days_load_with_their_base():
    from megactx.assets import resolve

    assert load_gistnet(resolve("asset:tiny-gistnet"), BaseLM.from_pretrained("asset:tiny-base")).block_size == 32


def test_a_tree_of_a_gistnet_that_reads_hidden_states_is_refused_with_other_layers(base_folder, tmp_path):
    base = load(base_folder)
    ids = torch.randint(2, 500, (1, 40))
    for kind in ("hidden", "embedding"):
        net, folder = net_of(base, input=kind, input_layer=1), tmp_path / kind
        tree = MegaContextTree(net, base)
        tree.append(ids, gists=torch.zeros(1, 5, base.width) if kind == "hidden" else None)
        tree.save(folder)
        assert MegaContextTree.load(folder, net, load(base_folder)).lengths.tolist() == [40]
    other = with_other_layers(load(base_folder))
    assert MegaContextTree.load(tmp_path / "embedding", net, other).lengths.tolist() == [40]
    with pytest.raises(ValueError, match="another base LM: layers"):
        MegaContextTree.load(tmp_path / "hidden", net_of(base, input="hidden", input_layer=1), other)
