"""The walk of docs/own_model.md: a local Hugging Face folder and a folder of texts become a trained GistNet."""

import json
import os
import pydoc_data.topics
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from megactx.framework.app import run

REPOSITORY = Path(__file__).parents[1]
SMALL = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
SMALL |= dict(vocab_size=512, max_position_embeddings=1024, bos_token_id=0, eos_token_id=None, pad_token_id=1)
FEW = ["preset=demo", "preset.steps=3", "preset.warmup=1", "preset.validate_every=3", "preset.batch=1"]
FEW += ["preset.spans=4", "preset.validation_documents=2", "preset.max_tokens=512", "preset.min_tokens=256"]
FEW += ["stage.evaluate.blocks=16", "stage.evaluate.copies=2", "stage.lr=1e-2"]
FEW += ["trainer=cpu", "trainer.precision=32-true"]
TEXT = " ".join(f"Block {number} is one of {number * number} that a gist can stand for." for number in range(40))
LOAD = """
import torch
from megactx.stages.gist import GistStage

stage = GistStage.load_from_checkpoint({path!r}).eval()
ids = torch.tensor(stage.base.tokenizer({text!r})["input_ids"])
blocks = ids[: len(ids) // 32 * 32].view(-1, 32)
with torch.no_grad():
    embedded = stage.base.embed(blocks)
    gists = stage.gistnet.encode_block(embedded)
"""


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder of txt, md and py of a few thousand characters each."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "deeper").mkdir()
    for number, (name, text) in enumerate(sorted(pydoc_data.topics.topics.items())):
        if len(text) > 2500:
            (folder / f"{name}.{('txt', 'md')[number % 2]}").write_text(text, encoding="utf-8")
    modules = [path for path in Path(sysconfig.get_path("stdlib")).glob("*.py") if 3000 < path.stat().st_size < 9000]
    for path in sorted(modules)[:30]:
        shutil.copy(path, folder / "deeper" / path.name)
    return folder


@pytest.fixture(scope="module")
def model_of(tmp_path_factory, texts):
    """kind -> a Hugging Face folder with random weights, and a tokenizer trained on the texts."""
    import transformers

    from megactx.data.tokenizer import train_tokenizer

    found = sorted(texts.rglob("*.*"))
    tokenizer = train_tokenizer((path.read_text(encoding="utf-8") for path in found[::4]), 512, progress=False)
    made = {}

    def make(kind: str) -> Path:
        if kind not in made:
            torch.manual_seed(0)
            extra = {"head_dim": 16} if kind == "qwen3" else {}
            config = transformers.AutoConfig.for_model(kind, **SMALL, **extra)
            model = transformers.AutoModelForCausalLM.from_config(config)
            for p in model.parameters():
                p.data *= 3  # random weights hardly react to what they read
            made[kind] = tmp_path_factory.mktemp("models") / kind
            model.save_pretrained(made[kind])
            tokenizer.save_pretrained(made[kind])
        return made[kind]

    return make


def check_gists(gists, embedded):
    assert gists.shape == (len(embedded), 64) and len(gists) > 3 and torch.isfinite(gists).all()
    assert gists.dtype == torch.float32
    # An untrained GistNet gives the last token's embedding, exactly.
    assert (gists - embedded[:, -1]).abs().max() > 1e-4
    assert torch.pdist(gists).min() > 1e-3


@pytest.mark.slow
def test_a_local_qwen3_and_a_folder_of_texts_become_a_gistnet_that_loads_from_its_path(
    model_of, texts, tmp_path, monkeypatch, capsys
):
    model = model_of("qwen3")
    monkeypatch.chdir(model.parent)  # the model by a relative path, as one types it
    command = ["experiment=gist_stage1", "base=hf", "base.name=qwen3", "data=files", f"data.path={texts}", *FEW]
    assert run([*command, f"folder={tmp_path / 'run'}"]) == 0
    said = capsys.readouterr().out
    assert "training documents" in said and "Memory of a step with 1 documents of 512 tokens: about" in said
    assert {"report.md", "report.png", "done"} <= {path.name for path in (tmp_path / "run").iterdir()}

    monkeypatch.chdir(tmp_path)  # the checkpoint knows its base from anywhere
    room = {}
    exec(LOAD.format(path=str(tmp_path / "run/checkpoints/last.ckpt"), text=TEXT), room)
    check_gists(room["gists"], room["embedded"])


@pytest.mark.slow
def test_a_local_smollm3_and_a_folder_of_texts_become_a_gistnet_in_a_shell(model_of, texts, tmp_path):
    model, environment = model_of("smollm3"), {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, str(REPOSITORY / "train.py"), "experiment=gist_stage1", "base=hf", "base.name=smollm3"]
    command += ["data=files", f"data.path={texts}", *FEW, f"folder={tmp_path / 'run'}"]
    done = subprocess.run(command, cwd=model.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Result on held-out documents" in done.stdout and "Loading weights" not in done.stderr
    path = str(tmp_path / "run" / "checkpoints" / "best.ckpt")
    program = LOAD.format(path=path, text=TEXT)
    program += "torch.save([gists, embedded], 'gists.pt')"
    loaded = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert loaded.returncode == 0, loaded.stderr
    check_gists(*torch.load(tmp_path / "gists.pt", weights_only=True))


def test_the_python_of_the_page_is_what_was_tested():
    page = (REPOSITORY / "docs" / "own_model.md").read_text(encoding="utf-8")
    for line in filter(None, LOAD.splitlines()):
        shown = line.replace("{path!r}", '"runs/my_gists/checkpoints/best.ckpt"').replace("{text!r}", "text")
        assert shown in page


def edit(folder: Path, name: str, **changes) -> None:
    values = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps({key: value for key, value in values.items() if value != "gone"}))


def without_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


def without_bos(folder):
    edit(folder, "tokenizer_config.json", bos_token="gone")


def with_another_tokenizer(folder):
    for path in (REPOSITORY / "megactx" / "assets" / "tiny-base").glob("tokenizer*"):
        shutil.copy(path, folder)


def with_more_layers(folder):
    edit(folder, "config.json", num_hidden_layers=6, layer_types="gone")


def with_another_width(folder):
    edit(folder, "config.json", intermediate_size=160)


def with_cut_weights(folder):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])


def with_pickled_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def with_few_positions(folder):
    edit(folder, "config.json", max_position_embeddings=300)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_tokenizer, "it has no vocabulary; is tokenizer.json missing?"),
        (without_bos, "neither a BOS nor an EOS token; set bos_token"),
        (with_another_tokenizer, "the tokenizer has 8192 ids, but the model only 512 embedding rows"),
        (with_more_layers, "22 tensors are missing or have another shape; the first is model.layers.4"),
        (with_another_width, "12 tensors are missing or have another shape"),
        (with_cut_weights, "no causal LM could be loaded from there"),
        (with_pickled_weights, "no causal LM could be loaded from there (Error no file named model.safetensors"),
        (with_few_positions, "data.max_tokens=512 is not allowed: 300 at most"),
    ],
)
def test_a_folder_that_is_not_in_order_is_refused_in_one_message(change, said, model_of, texts, tmp_path, capsys):
    shutil.copytree(model_of("qwen3"), tmp_path / "model")
    change(tmp_path / "model")
    assert start(tmp_path, f"base.name={tmp_path / 'model'}", f"data.path={texts}") == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["base.name=/nowhere/model"], "base.name=/nowhere/model: there is no such folder"),
        (["base.name=null"], "base.name is not set"),
        (["base.dtype=fp16"], "base.dtype=fp16 is not known, allowed are float32, bfloat16, float16, or null"),
        (["gistnet.num_heads=5"], "gistnet.num_heads=5 does not divide the base LM's width 64"),
        (["data.path=null"], "data.path is not set"),
        (["preset.batch=0"], "preset.batch=0: allowed is a whole number from 1"),
        (
            ["preset.min_tokens=64"],
            "horizon.tokens=32 does not fit into data.min_tokens=64: a document needs 96 tokens",
        ),
        (["data.weights.narrative=0"], "at least one weight must be above 0"),
    ],
)
def test_a_setting_that_does_not_fit_is_named(settings, said, model_of, texts, tmp_path, capsys):
    assert start(tmp_path, f"base.name={model_of('qwen3')}", f"data.path={texts}", *settings) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def write_three(folder, texts):
    for path in sorted(texts.glob("*.txt"))[:3]:
        shutil.copy(path, folder)


def write_short(folder, texts):
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"A short text, number {number}.")


def write_code(folder, texts):
    shutil.copytree(texts / "deeper", folder, dirs_exist_ok=True)


def write_latin(folder, texts):
    (folder / "old.txt").write_bytes("naïve ".encode("latin-1") * 1000)


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (write_three, "there is no held-out text; one in ten is held out by a hash of the text, so give more texts"),
        (write_short, "data.min_tokens=256: none of the 3"),
        (write_code, "only of code; set it to 0 and give one of those a weight, or, with data=files, set data.domain="),
        (write_latin, "old.txt: not UTF-8 text"),
    ],
)
def test_texts_that_cannot_be_trained_on_are_refused_with_what_to_do(write, said, model_of, texts, tmp_path, capsys):
    folder = tmp_path / "texts"
    folder.mkdir()
    write(folder, texts)
    assert start(tmp_path, f"base.name={model_of('qwen3')}", f"data.path={folder}") == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def start(tmp_path, *settings) -> int:
    return run(["experiment=gist_stage1", "base=hf", "data=files", *FEW, f"folder={tmp_path / 'run'}", *settings])
