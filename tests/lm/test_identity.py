"""What is written down of a base LM tells it from any other one."""

import pytest
import torch
from small_base import SMALL

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


LLAMA3 = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=32)
GPT2 = dict(model_type="gpt2", vocab_size=97, n_embd=64, n_layer=2, n_head=4, n_positions=128)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2)
# A family, and two values of a setting under which its weights are two functions.
FUNCTIONS = {
    "rotated share": ("gpt_neox", {}, {"rope_parameters": [{"partial_rotary_factor": p} for p in (0.25, 0.5)]}),
    "parallel residual": ("gpt_neox", {}, {"use_parallel_residual": [True, False]}),
    "scaled attention": ("gpt2", GPT2, {"scale_attn_weights": [True, False]}),
    "scaled by layer": ("gpt2", GPT2, {"scale_attn_by_inverse_layer_idx": [False, True]}),
    "length of training": (
        "llama",
        {},
        {"rope_parameters": [LLAMA3 | {"original_max_position_embeddings": n} for n in (32, 64)]},
    ),
    "scale of yarn": ("llama", {}, {"rope_parameters": [YARN, YARN | {"attention_factor": 2.0}]}),
    "epsilon": ("starcoder2", {"sliding_window": None}, {"norm_epsilon": [1e-5, 0.1]}),
    "clipping": ("olmo", {}, {"clip_qkv": [None, 0.5]}),
    "experts": ("olmoe", EXPERTS, {"num_experts_per_tok": [2, 4]}),
    "weights of experts": ("olmoe", EXPERTS, {"norm_topk_prob": [False, True]}),
    "layers without rotation": (
        "smollm3",
        {},
        {"no_rope_layers": [[1, 1, 1, 0], [1, 0, 1, 0]]},
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@torch.no_grad()
def test_whatever_makes_two_functions_of_the_same_weights_makes_two_bases(name):
    kind, more, changed = FUNCTIONS[name]
    ((setting, values),) = changed.items()
    ids, found, logits = torch.arange(3, 83)[None], [], []
    for value in values:
        torch.manual_seed(0)
        sizes = {} if kind == "gpt2" else SMALL
        base = BaseLM.from_config(sizes | more | {"model_type": kind, setting: value}).freeze()
        for parameter in base.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape) * 0.2)
        found.append(of_weights(base))
        logits.append(base.logits(base(base.embed(ids), None)))
    assert (logits[0] - logits[1]).abs().max() > 1e-2, "they are one function"
    assert found[0] != found[1]


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
