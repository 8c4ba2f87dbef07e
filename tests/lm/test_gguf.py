"""A GGUF file is a base LM like any other: the same function, read once, and refused in one sentence."""

import json
import os
import shutil
import sys
import time

import pytest
import torch

pytest.importorskip("gguf", reason="the extra megactx[gguf] is not installed")

from safetensors.torch import load_file
from tiny_gguf import write_gguf
from transformers import AutoModelForCausalLM

from megactx.data import gguf_base
from megactx.data.tokenizer import bos_id, load_tokenizer, tokenizer_hash
from megactx.lm import BaseLM
from megactx.lm.identity import of_embeddings, of_weights

TEMPLATE = "{% for m in messages %}<|bos|>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGACTX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def source(base_folder):
    return AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32, attn_implementation="sdpa").eval()


@pytest.fixture
def written(tmp_path, source, tiny_tokenizer):
    """-> a new GGUF file of the small base."""

    def make(name="small.gguf", kind="F32", **fields):
        return write_gguf(tmp_path / name, source, tiny_tokenizer, kind, **fields)

    return make


@pytest.mark.parametrize(("kind", "near"), [("F32", 1e-5), ("F16", 2e-2), ("Q8_0", 0.3)])
def test_a_gguf_file_is_the_model_that_it_was_made_of(written, source, kind, near):
    base = BaseLM.from_pretrained(str(written(kind=kind)), "float32").freeze()
    ids = torch.arange(2, 60)[None]
    with torch.no_grad():
        found, wanted = base.logits(base(base.embed(ids), None)), source(ids).logits
    assert base.model.dtype == torch.float32 and (found - wanted).abs().max() < near * wanted.std()
    assert base.config.rope_parameters["rope_theta"] == source.config.rope_parameters["rope_theta"]
    assert base.max_positions == source.config.max_position_embeddings


def test_weights_of_16_bits_are_those_of_the_file(written, source):
    model = BaseLM.from_pretrained(str(written(kind="F16"))).model
    for name, wanted in source.state_dict().items():
        assert model.state_dict()[name].equal(wanted.half().float() if wanted.ndim > 1 else wanted), name


def test_an_untied_head_stays_one(tmp_path, tiny_tokenizer, source):
    config = source.config.to_dict() | {"tie_word_embeddings": False}
    untied = BaseLM.from_config({**config, "model_type": "llama"}).model
    base = BaseLM.from_pretrained(str(write_gguf(tmp_path / "untied.gguf", untied, tiny_tokenizer)))
    assert base.model.lm_head.weight.equal(untied.lm_head.weight)
    assert base.model.get_input_embeddings().weight.equal(untied.get_input_embeddings().weight)


def test_the_rotation_of_llama_3_is_put_back(tmp_path, source, tiny_tokenizer):
    asked = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    asked |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    config = source.config.to_dict() | {"rope_parameters": asked, "max_position_embeddings": 131072}
    three = type(source)(type(source.config)(**config)).eval()
    three.load_state_dict(source.state_dict())
    divided = 500000.0 ** (-torch.arange(8) / 8) / three.model.rotary_emb.inv_freq
    assert [round(x, 2) for x in divided.tolist()] == [1, 1, 1, 1, 2.69, 8, 8, 8]
    base = BaseLM.from_pretrained(str(write_gguf(tmp_path / "3.gguf", three, tiny_tokenizer, divided=divided))).freeze()
    ids = torch.arange(2, 500)[None]
    with torch.no_grad():
        assert torch.allclose(base.logits(base(base.embed(ids), None)), three(ids).logits, atol=1e-3)
    refused(write_gguf(tmp_path / "odd.gguf", three, tiny_tokenizer, divided=divided + 0.5), "rope_freqs.weight is not")


def test_the_tokenizer_is_the_files_own(written, tiny_tokenizer):
    tokenizer = BaseLM.from_pretrained(str(written(tokenizer__chat_template=TEMPLATE))).tokenizer
    for text in ("def f(x):\n    return 1987 + x", "a  12   b\t\t9", "voilà <|bos|> 你好"):
        wanted = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == wanted
        assert tokenizer.decode(wanted) == text
    assert tokenizer.tokenize("2026") == ["2", "0", "2", "6"]
    assert bos_id(tokenizer) == tiny_tokenizer.bos_token_id and tokenizer.pad_token == tiny_tokenizer.pad_token
    assert tokenizer.chat_template == TEMPLATE


def test_the_tokenizer_alone_is_read_from_the_file_too(written):
    path = str(written())
    assert tokenizer_hash(load_tokenizer(path)) == tokenizer_hash(BaseLM.from_pretrained(path).tokenizer)


def test_what_lies_beside_the_file_is_not_of_it(written, tmp_path):
    path = written(tokenizer__chat_template=TEMPLATE)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "another", "bos_token": "x"}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    base = BaseLM.from_pretrained(str(path))
    assert base.tokenizer.chat_template == TEMPLATE and base.model.generation_config.eos_token_id is None


def test_a_file_is_converted_once(written, own_cache, monkeypatch):
    path = written()
    first = BaseLM.from_pretrained(str(path))
    monkeypatch.setitem(sys.modules, "gguf", None)  # what is in the cache needs no package
    monkeypatch.setattr(gguf_base, "_convert", None)
    again = BaseLM.from_pretrained(str(path))
    other_name = shutil.copy(path, path.with_name("other.GGUF"))
    same = BaseLM.from_pretrained(str(other_name))
    assert of_weights(first) == of_weights(again) == of_weights(same)
    (folder,) = own_cache.iterdir()
    assert {"config.json", "model.safetensors", "tokenizer.json", "source.json"} <= {p.name for p in folder.iterdir()}
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert all(tensor.dtype == torch.float32 for tensor in load_file(folder / "model.safetensors").values())


def test_another_content_with_the_same_time_of_change_is_another_base(written, source, tmp_path, tiny_tokenizer):
    path = written()
    first, stamp = BaseLM.from_pretrained(str(path)), os.stat(path)
    other = BaseLM.from_config(source.config.to_dict() | {"model_type": "llama"}).model
    write_gguf(path, other, tiny_tokenizer)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert os.stat(path).st_size == stamp.st_size and os.stat(path).st_mtime_ns == stamp.st_mtime_ns
    second = BaseLM.from_pretrained(str(path))
    assert of_embeddings(first) != of_embeddings(second) and of_weights(first) != of_weights(second)
    assert second.model.get_input_embeddings().weight.equal(other.get_input_embeddings().weight)


def test_a_folder_with_one_gguf_file_is_that_base(written, tmp_path):
    path = written("sub.gguf")
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.move(path, folder / "sub.gguf")
    assert BaseLM.from_pretrained(str(folder)).width == 32


def test_of_several_gguf_files_one_must_be_named(tmp_path):
    for name in ("b.gguf", "a.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"^base.name={tmp_path}: there are 2 GGUF files, name one: a.gguf, b.gguf$"):
        BaseLM.from_pretrained(str(tmp_path))


def test_a_hugging_face_folder_stays_one_with_a_gguf_file_in_it(base_folder, tmp_path):
    shutil.copytree(base_folder, tmp_path / "own")
    (tmp_path / "own" / "quantised.gguf").touch()
    assert BaseLM.from_pretrained(str(tmp_path / "own")).width == 32


def refused(path, match):
    with pytest.raises(ValueError, match=match) as told:
        BaseLM.from_pretrained(str(path))
    assert str(told.value).startswith(f"base.name={path}: ") and "\n" not in str(told.value)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    refused(tmp_path / "no.gguf", "there is no such file$")


def test_without_the_package_it_is_said_what_to_install(written, monkeypatch):
    path = written()
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(path, r"a GGUF file needs the package gguf: pip install 'megactx\[gguf\]'$")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.5, 0.99])
def test_a_file_that_is_cut_short_is_refused_and_leaves_nothing(written, own_cache, share):
    path = written()
    os.truncate(path, int(path.stat().st_size * share))
    refused(path, "it is damaged, cut short, or no GGUF file")
    assert not own_cache.exists() or not any(own_cache.iterdir())


def test_another_file_of_that_name_is_refused(tmp_path):
    (tmp_path / "text.gguf").write_text("Once upon a time. " * 100)
    refused(tmp_path / "text.gguf", "no GGUF file")


def test_a_quantisation_that_nobody_knows_is_refused(written):
    path = written()
    raw = path.read_bytes()
    place = raw.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 2 * 8
    path.write_bytes(raw[:place] + (77).to_bytes(4, "little") + raw[place + 4 :])
    refused(path, "an unknown quantisation, type 77")


def test_a_quantisation_that_cannot_be_unpacked_is_refused_by_name(written):
    import gguf

    path = written()
    raw = path.read_bytes()
    place = raw.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 2 * 8
    kind = gguf.GGMLQuantizationType.I32
    path.write_bytes(raw[:place] + int(kind).to_bytes(4, "little") + raw[place + 4 :])
    refused(path, "token_embd.weight is of the quantisation I32")


def test_an_architecture_that_nobody_knows_is_refused(written):
    refused(written(arch="mamba9"), "mamba9")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"tokenizer__ggml__pre": "viking"}, "tokenizer.ggml.pre=viking"),
        ({"llama__rope__scaling__type": "yarn"}, "llama.rope.scaling.type=yarn"),
        ({"split__count": 3}, "one of 3 parts"),
        ({"tokenizer__ggml__model": None, "tokenizer__ggml__tokens": None}, "tokenizer"),
        ({"llama__block_count": 3}, "tensors are missing"),
        ({"llama__block_count": 1}, "transformers leaves 9 of its tensors out, the first is blk.1."),
    ],
)
def test_what_would_be_passed_over_is_refused(written, fields, match):
    refused(written(**fields), match)


def test_a_gguf_file_of_the_cache_is_loaded_at_once(written):
    path = str(written())
    BaseLM.from_pretrained(path)
    began = time.process_time()
    BaseLM.from_pretrained(path)
    assert time.process_time() - began < 2


def test_the_command_converts_and_says_where(written, own_cache, capsys):
    path = str(written())
    assert gguf_base.main([path, "--sha256", "0" * 64]) == 2
    assert "its sha256 is" in capsys.readouterr().err and not own_cache.exists()
    assert gguf_base.main([path]) == 0
    (folder,) = own_cache.iterdir()
    assert str(folder) in capsys.readouterr().out


def test_the_base_of_another_package_says_how_to_get_it(monkeypatch, capsys):
    from megactx.framework.config.search_path import compose

    assert compose(["base=smollm2"]).base.name == "asset:smollm2"  # composes without the file
    monkeypatch.setattr("megactx.assets.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^base.name=asset:smollm2: it is not installed, .*\(make smollm2, or: pip"):
        BaseLM.from_pretrained("asset:smollm2")


@pytest.mark.long
def test_smollm2_is_the_model_that_people_know(monkeypatch, cache):
    monkeypatch.setenv("MEGACTX_CACHE", str(cache))
    try:
        base = BaseLM.from_pretrained("asset:smollm2", "float32").freeze()
    except ValueError as error:
        pytest.skip(str(error))
    assert (base.width, base.vocab_size, base.max_positions) == (576, 49152, 8192)
    assert base.tokenizer.tokenize("  1987") == ["ĠĠ", "1", "9", "8", "7"]
    assert base.tokenizer.bos_token == "<|im_start|>" and base.tokenizer.eos_token == "<|im_end|>"
    ids = torch.tensor([base.tokenizer("The capital of France is the city of", add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        found = base.logits(base(base.embed(ids), None))[0, -1].argmax()
    assert base.tokenizer.decode(found) == " Paris"
    began = time.process_time()
    BaseLM.from_pretrained("asset:smollm2", "float32")
    assert time.process_time() - began < 2
