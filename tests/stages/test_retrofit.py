"""A base LM and a folder of text become a model with MegaContext, through any number of kills."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megactx.apps import chat
from megactx.focus.keys import KeyNet
from megactx.lm import BaseLM
from megactx.parts.read import load_keys
from megactx.parts.write import save_keys
from megactx.stages import keys as keys_of_blocks
from megactx.stages import retrofit
from megactx.stages.export import MANIFEST

REPOSITORY = Path(__file__).parents[2]
FEW = ["gist:stage.evaluate.blocks=8", "gist:stage.evaluate.controls=false", "lens:stage.evaluate.documents=2"]
FEW += ["lens:stage.windows.edits=2", "trainer=cpu", "trainer.precision=32-true"]
KILLED = """
import os, signal, sys
from megactx.stages.gist import GistStage
from megactx.stages.retrofit import main

original = GistStage.training_step

def dies(self, *arguments):
    if self.global_step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *arguments)

GistStage.training_step = dies
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.long
def test_a_retrofit_that_is_killed_in_a_step_and_between_steps_ends_with_an_export_that_answers(
    texts, tmp_path, monkeypatch, capsys
):
    base = BaseLM.from_pretrained("asset:tiny-base", "float32").freeze()
    save_keys(KeyNet(base.embeddings(), 16), base, tmp_path / "keys")
    command = ["asset:tiny-base", str(texts), str(tmp_path / "out"), "preset=smoke", *FEW, f"keys={tmp_path / 'keys'}"]
    work = tmp_path / "out.retrofit"
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    first = subprocess.run([sys.executable, "-c", KILLED, *command], env=env, capture_output=True, text=True)
    assert first.returncode == -signal.SIGKILL and not (work / "gist" / "done").exists()
    before = len((work / "gist.log").read_text())

    with monkeypatch.context() as patched:  # killed where the first step is done and the second is to begin
        train = retrofit.Retrofit._train

        def only_gist(self, step, number):
            if step != "gist":
                raise SystemExit(9)
            return train(self, step, number)

        patched.setattr(retrofit.Retrofit, "_train", only_gist)
        with pytest.raises(SystemExit):
            retrofit.main(command)
    log = (work / "gist.log").read_text()[before:]
    assert "step 2" in log and (work / "gist" / "done").exists() and not (tmp_path / "out").exists()
    done = (work / "gist" / "done").stat().st_mtime_ns

    assert retrofit.main(command) == 0
    said = capsys.readouterr().out
    assert "2 of 3  LensNet" in said and "3 of 3  export" in said and "1 of 3" not in said.partition("2 of 3")[2]
    assert (work / "gist" / "done").stat().st_mtime_ns == done
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## GistNet" in card and "recovery" in card and "## LensNet" in card and "Memory of a step" in card
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["adapter_parameters"] == 0 and "README.md" in manifest["files"]

    assert retrofit.main([*command, "seed=1"]) == 2  # not another model in the same place
    assert "made with other settings: nothing is now seed=1" in capsys.readouterr().err

    _answers(tmp_path / "out", tmp_path, monkeypatch, capsys)

    # Adapters, later: the other steps are done.
    assert retrofit.main([*command, "lora=4", "lora:stage.evaluate.documents=2"]) == 0
    assert (work / "gist" / "done").stat().st_mtime_ns == done
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["adapter_parameters"] > 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Adapters of rank 4 are merged" in card and "## LoRA" in card and "its own perplexity on 2 documents" in card
    _answers(tmp_path / "out", tmp_path / "again", monkeypatch, capsys)


def _answers(model, tmp_path, monkeypatch, capsys):
    import io

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"What is a gist?")))
    assert chat.main(["--model", str(model), "--tokens", "8"]) == 0
    assert len(capsys.readouterr().out.strip()) > 3

    from openai import OpenAI

    from megactx.apps.serve import keys
    from megactx.apps.serve.app import build
    from megactx.apps.serve.engine import Engine
    from megactx.apps.serving import Server
    from megactx.runtime import Controller, Sampling, load_models

    controller = Controller(load_models(str(model)))
    assert controller.models.lensnet is not None and controller.models.keys.size == 16 and controller.notes == []
    key, engine = keys.generated(), Engine(tmp_path / "memories", controller, 2, 4).start()
    with Server(0) as server:
        app = build(engine, keys.Keys(keys.alone(key), 100, 10_000), "out", 8, Sampling(), server.host)
        server.start(app, ending=engine.end)
        client = OpenAI(base_url=f"{server.address}/v1", api_key=key, max_retries=0)
        asked = [{"role": "user", "content": "What is a gist?"}]
        assert client.chat.completions.create(model="out", messages=asked).usage.completion_tokens == 8
    engine.close()


def test_later_steps_have_the_share_of_their_length_that_time_left_of_the_first(tmp_path):
    made = retrofit.Retrofit("asset:tiny-base", "texts", tmp_path / "out", ["lora=8", "lens:preset.lens.windows=15"])
    assert made._paced("lens") == made.commands["lens"]  # nothing has been timed yet
    (made.work / "gist").mkdir(parents=True)
    for steps, own in ((540, []), (270, ["preset.steps=270", "preset.report.documents=10"])):
        (made.work / "gist" / "config.yaml").write_text(f"preset: {{steps: {steps}}}")
        assert made._paced("lens") == [*made.commands["lens"], *own]
    assert made._paced("lora")[-2:] == ["preset.alternating.lora=30", "preset.alternating.report=4"]
    assert made._paced("gist") == made.commands["gist"]


def test_keys_are_trained_once_and_too_little_text_is_said(texts, tmp_path, monkeypatch):
    def begun(steps, of=texts):
        made = retrofit.Retrofit("asset:tiny-base", str(of), tmp_path / "out", [f"keys={steps}"])
        made.work.mkdir(exist_ok=True)
        made._train_keys()
        return made

    (tmp_path / "short.txt").write_text("A short text.")
    without = begun(3, tmp_path / "short.txt")
    assert without.keys is None and "at least 20 are needed" in without.about_keys
    monkeypatch.setattr(keys_of_blocks, "BLOCKS", 12)
    monkeypatch.setattr(keys_of_blocks, "TOLD", 3)
    made = begun(3)
    base = BaseLM.from_pretrained("asset:tiny-base", "float32").freeze()
    assert load_keys(made.keys, base).size == 64 and made.about_keys.startswith("megactx.stages.keys, 3 steps")
    when = (made.keys / "model.safetensors").stat().st_mtime_ns
    assert begun(3).keys == made.keys and (made.keys / "model.safetensors").stat().st_mtime_ns == when
    assert begun(2).about_keys.startswith("megactx.stages.keys, 2 steps")
    assert begun(0).keys is None


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["preset=quick"], "preset=quick is not allowed: smoke, demo, full"),
        (["lora:preset.steps=3"], "there is no step lora; allowed are gist, lens"),
        (["lora=8", "keys:a=3"], "there is no step keys; allowed are gist, lens, lora"),
        (["lora=2"], "lora=2 is not allowed: a rank from 4 to 16, or 0"),
        (["lora=many"], "lora=many is not allowed: a rank from 4 to 16, or 0"),
        (["folder=here"], "folder=here is not allowed"),
        (["keys=nowhere"], "keys=nowhere is not allowed: steps of training, a whole number from 0"),
        (["keys=-1"], "keys=-1 is not allowed"),
        (["lens:resume=never"], "lens:resume=never is not allowed"),
    ],
)
def test_a_setting_that_is_not_allowed_is_told_before_anything_is_written(overrides, told, tmp_path, capsys):
    assert retrofit.main(["asset:tiny-base", str(tmp_path), str(tmp_path / "out"), *overrides]) == 2
    assert told in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_a_folder_of_somebody_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    assert retrofit.main(["asset:tiny-base", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "holds something that is no export" in capsys.readouterr().err and len(list(tmp_path.iterdir())) == 1


def test_a_mistake_of_a_step_is_told_with_its_exit_code(tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    place = [str(tmp_path / "texts"), str(tmp_path / "out")]
    assert retrofit.main(["asset:tiny-base", *place, "preset=smoke", "gist:preset.stepz=3"]) == 2
    assert "preset.stepz: no such setting" in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == [tmp_path / "texts"]


def test_a_setting_reaches_both_steps_or_the_one_that_it_names(tmp_path):
    made = retrofit.Retrofit(
        "my model", "t", tmp_path / "out", ["seed=2", "gist:a.b=c:d", "lens:experiment=lens", "x={a: b}"]
    )
    gist, lens = made.commands["gist"], made.commands["lens"]
    assert {"seed=2", "a.b=c:d", "x={a: b}", "base.name='my model'"} <= set(gist) and "a.b=c:d" not in lens
    assert gist[0] == "experiment=retrofit_gist" and lens[0] == "experiment=lens"
    assert f"stage.gistnet={tmp_path}/out.retrofit/gist" in lens


def test_what_a_later_step_would_refuse_is_refused_before_the_gist_step_trains(texts, tmp_path, capsys):
    command = ["asset:tiny-base", str(texts), str(tmp_path / "out"), "preset=smoke", *FEW]
    for setting, message in (
        ("lens:stage.budgets=[0.5,0.1]", "LensNet: stage.budgets=[0.5, 0.1]: 0.1 of 640 tokens are 64 entries"),
        ("lora:stage.budgets=[0.5,0.1]", "LoRA: stage.budgets=[0.5, 0.1]: 0.1 of 640 tokens are 64 entries"),
        ("lora:stage.evaluate.tokens=100000", "LoRA: stage.evaluate.tokens=100000: none of held-out documents"),
        ("lens:stage.evaluate.tokens=100000", "none of held-out documents has so many tokens"),
        ("lens:datamodule.min_tokens=5000", "LensNet: data.min_tokens=5000"),
    ):
        assert retrofit.main([*command, "lora=4", setting]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out.retrofit").exists()


def test_what_is_refused_or_interrupted_in_its_checks_leaves_no_folder_that_it_made(
    texts, tmp_path, monkeypatch, capsys
):
    command = ["asset:tiny-base", str(texts), str(tmp_path / "new" / "out"), "preset=smoke", *FEW]
    refused = [*command, "lens:datamodule.min_tokens=5000"]
    assert retrofit.main(refused) == 2 and not (tmp_path / "new").exists()

    with monkeypatch.context() as patched:

        def interrupted(self):
            assert (self.work / "lock").exists()
            raise KeyboardInterrupt

        patched.setattr(retrofit.Retrofit, "_check", interrupted)
        assert retrofit.main(command) == 130 and not (tmp_path / "new").exists()

    work = tmp_path / "new" / "out.retrofit"  # one that was there before stays
    work.mkdir(parents=True)
    (work / "gist.log").write_text("step 1")
    assert retrofit.main(refused) == 2 and (work / "gist.log").read_text() == "step 1"
    assert "LensNet: data.min_tokens=5000" in capsys.readouterr().err
