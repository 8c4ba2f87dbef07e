"""A run on a GGUF file: trained, talked to, and refused when the file holds another base by then."""

import pytest
import torch

pytest.importorskip("gguf", reason="the extra megactx[gguf] is not installed")

from tiny_gguf import write_gguf
from transformers import AutoModelForCausalLM

from megactx.framework.app import run
from megactx.runtime import load_models


@pytest.mark.slow
def test_a_run_on_a_gguf_file_is_a_run_like_any_other(gist_run, base_folder, tiny_tokenizer, tmp_path, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    write_gguf(tmp_path / "small.gguf", model, tiny_tokenizer)
    monkeypatch.chdir(tmp_path)
    settings = [s for s in gist_run if not s.startswith("base.name=")]
    assert run([*settings, "base=hf", "base.name=small.gguf", "base.dtype=float32"]) == 0
    monkeypatch.chdir("/")  # the checkpoint knows where the file is
    models = load_models(str(tmp_path / "run"), "cpu")
    assert models.gistnet is not None and models.base.model.dtype == torch.float32
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1.5)
    write_gguf(tmp_path / "small.gguf", model, tiny_tokenizer)
    with pytest.raises(ValueError, match="base"):
        load_models(str(tmp_path / "run"), "cpu")


def test_a_gguf_file_that_cannot_be_read_ends_a_run_with_one_message(gist_run, tmp_path, capsys):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF\3\0\0\0")
    assert run([*gist_run, f"base.name={tmp_path / 'broken.gguf'}"]) == 2
    error = capsys.readouterr().err
    assert f"base.name={tmp_path / 'broken.gguf'}: this GGUF file cannot be" in error and "Traceback" not in error
