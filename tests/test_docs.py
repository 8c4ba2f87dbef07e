"""The pages of ``docs`` are current, and what they show works as it stands there."""

import csv
import re
from pathlib import Path

import pytest
import torch

from megactx.framework.app import run
from megactx.framework.config import methods_page, settings_page

DOCS = Path(__file__).parents[1] / "docs"
ADDING = (DOCS / "adding.md").read_text(encoding="utf-8")


def shown_files(text: str) -> dict[str, str]:
    """path -> content of the files that a page shows: a block of code is the file that was named last before it."""
    parts, found = text.split("```"), {}
    for prose, code in zip(parts[::2], parts[1::2], strict=False):
        named = re.findall(r"`(\w+/[\w/]+\.(?:py|yaml))`", prose)
        found[named[-1]] = code.partition("\n")[2]
    return found


FILES = shown_files(ADDING)


@pytest.fixture
def added(tmp_path, monkeypatch):
    """Puts files that the page shows where they belong, without touching the package: -> a function of their names."""

    def add(*names: str) -> list[str]:
        import importlib

        for name in names:
            path = tmp_path / "added" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(FILES[name])
            if path.suffix == ".py":
                package = importlib.import_module(".".join(Path(name).parent.parts))
                monkeypatch.setattr(package, "__path__", [*package.__path__, str(path.parent)])
        configs = {name.split("/")[0] for name in names if name.endswith(".yaml")}
        return [part for root in sorted(configs) for part in ("--config-dir", str(tmp_path / "added" / root))]

    return add


@pytest.mark.parametrize("made", [settings_page, methods_page], ids=lambda made: made.__name__.rpartition(".")[2])
def test_a_page_that_is_generated_is_current(made):
    path = DOCS / made.COMMAND.rpartition("/")[2]
    assert path.read_text(encoding="utf-8") == made.page(), f"docs/{path.name} is not current; run: {made.COMMAND}"
    assert made.main(["--check"]) == 0


def test_the_source_of_conversations_of_the_page_is_read_by_the_chat_template(added, tiny_tokenizer):
    from megactx.data.tokenizer import with_chat
    from megactx.data.turns import tokenised_conversations

    added("megactx/data/capitals.py")
    from megactx.data.capitals import CAPITALS, Capitals

    assert len(tokenised_conversations(Capitals(), with_chat(tiny_tokenizer), 64, "capitals")) == len(CAPITALS)
    assert len(Capitals().load()) == len(CAPITALS)


def test_the_table_of_methods_has_every_part_that_can_be_chosen():
    from megactx.evaluation import policies
    from megactx.focus import heads as lens_heads
    from megactx.gist import carriers, heads, losses, poolings
    from megactx.gist.parts import names

    page = (DOCS / "methods.md").read_text(encoding="utf-8")
    for package in (carriers, heads, losses, poolings, policies, lens_heads):
        assert all(f"\n| {name} | " in page for name in names(package)), package.__name__


def test_every_file_that_the_page_shows_is_found():
    assert {Path(name).name for name in FILES} >= {
        "largest.py",
        "deep.py",
        "counting.py",
        "counting.yaml",
        "unigram.py",
        "gist_length.py",
        "rare.py",
        "gated.py",
    }


def test_the_pooling_and_the_head_of_the_page_train(added):
    from megactx.gist import GistNet

    added("megactx/gist/poolings/largest.py", "megactx/gist/heads/deep.py")
    net = GistNet(64, 1.0, pooling="largest", head="deep", num_heads=4, skip="none")
    embeddings = torch.randn(3, 32, 64, requires_grad=True)
    net.encode_block(embeddings).sum().backward()
    assert embeddings.grad.abs().sum(dim=(1, 2)).min() > 0
    assert all(p.grad is not None for p in net.head.parameters())


@pytest.mark.slow
def test_the_carrier_of_the_page_learns_as_a_control_and_stands_in_the_table(added, gist_run, tmp_path):
    added("megactx/gist/carriers/weighted.py")
    control = "+stage.controls.weighted={name: weighted, block_size: 32}"
    assert run([*gist_run, control, "stage.evaluate.controls=false", "stage.evaluate.copies=0"]) == 0
    assert "weighted" in (tmp_path / "run" / "report.md").read_text()
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert (saved["nets.weighted.weights"] - 1 / 32).abs().max() > 0


@pytest.mark.slow
def test_the_loss_of_the_page_has_its_share_and_is_logged(added, gist_run, tmp_path):
    more = added("megactx/gist/losses/norm.py", "configs/loss/norm.yaml")
    assert run([*more, *gist_run, "+loss=norm", "loss.norm.weight=0.5"]) == 0
    assert "train/norm/loss" in (tmp_path / "run" / "metrics.csv").read_text().partition("\n")[0]


@pytest.mark.slow
def test_the_metric_of_the_page_is_logged_at_every_validation(added, gist_run, tmp_path):
    given = added("megactx/stages/gist_length.py", "configs/callbacks/lengths.yaml")
    asked = ["callbacks=lengths", "stage.evaluate.controls=false", "stage.evaluate.copies=0"]
    assert run([*given, *gist_run, *asked]) == 0
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        lengths = [float(row["val/gist_length"]) for row in csv.DictReader(file) if row["val/gist_length"]]
    assert len(lengths) == 2 and all(0 < length < 10 for length in lengths)


def test_the_policy_of_the_page_stands_beside_the_others_and_opens_what_it_likes(added, base_folder):
    from megactx.evaluation.focus import RANDOM, histories, windows
    from megactx.gist import GistNet
    from megactx.lm import BaseLM

    added("megactx/evaluation/policies/rare.py")
    base = BaseLM.from_pretrained(str(base_folder)).freeze()
    net = GistNet(base.width, base.embedding_rms(), block_size=8, num_heads=4)
    ids = torch.full((408,), 7)
    ids[40:48] = torch.arange(100, 108)  # a block of tokens that come once
    seen = [{"ids": ids, "cursor": 400}]
    ((_, _, tree, _, values),) = histories(base, net, seen)
    assert {RANDOM, "rarest tokens"} <= set(values) and values["rarest tokens"].shape == (1, 50)
    window = windows(tree, 200, values)["rarest tokens"]
    raw = window.index[0][window.lod[0] == 0]
    assert set(range(40, 48)) <= set(raw.tolist())


def test_the_lens_head_of_the_page_learns(added):
    from megactx.focus.lensnet import LensNet

    added("megactx/focus/heads/gated.py")
    net = LensNet(64, 8, layers=1, num_heads=4, head="gated", content=False)
    torch.nn.init.normal_(net.last.weight)
    entries = torch.zeros(2, 10, dtype=torch.long)
    values = net(torch.randn(2, 10, 64), entries, entries, entries == 0)
    assert values.shape == (2, 10, 2)
    values.pow(2).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in net.head.parameters())


@pytest.mark.slow
def test_the_carrier_of_the_page_can_be_what_the_stage_is_about(added, gist_run, tmp_path):
    given = added("megactx/gist/carriers/weighted.py", "configs/compressor/weighted.yaml")
    asked = [override for override in gist_run if not override.startswith("gistnet.")]
    settings = ["compressor=weighted", "stage.evaluate.controls=false", "stage.evaluate.copies=0"]
    assert run([*given, *asked, *settings]) == 0
    assert '"subject": "weighted"' in (tmp_path / "run" / "report.json").read_text()


def test_a_part_whose_class_has_another_name_is_told(added, monkeypatch):
    from megactx.gist import GistNet

    monkeypatch.setitem(FILES, "megactx/gist/poolings/widest.py", FILES["megactx/gist/poolings/largest.py"])
    added("megactx/gist/poolings/widest.py")
    with pytest.raises(ValueError, match="gistnet.pooling=widest: .*widest.py has no class Widest"):
        GistNet(64, 1.0, pooling="widest", num_heads=4)


@pytest.mark.slow
def test_the_data_source_of_the_page_can_be_chosen_and_read(added, tmp_path):
    given = added("megactx/data/counting.py", "configs/data/counting.yaml")
    short = ["experiment=tokenizer", "stage.vocab_size=300", "+data.source.numbers=50", f"folder={tmp_path / 'run'}"]
    assert run([*given, "data=counting", *short]) == 0
    assert (tmp_path / "run" / "tokenizer" / "tokenizer.json").exists()
    few = ["data.source.texts=40", "preset.steps=1", "preset.accumulate=1", "preset.spans=1", "trainer=cpu"]
    printed = re.search(r"python train.py (experiment=.*data=counting)\n", ADDING)[1].split()
    assert run([*given, *printed, *few, f"folder={tmp_path / 'gist'}", "debug=limit"]) == 0


def test_a_misspelt_setting_of_an_added_source_is_told(added, tmp_path, capsys):
    given = added("megactx/data/counting.py", "configs/data/counting.yaml")
    assert (
        run([*given, "experiment=tokenizer", "data=counting", "+data.source.number=5", f"folder={tmp_path / 'r'}"]) == 2
    )
    assert "Did you mean data.source.numbers?" in capsys.readouterr().err


@pytest.mark.slow
def test_the_stage_of_the_page_runs_and_loads_from_its_checkpoint(added, tmp_path):
    import importlib

    added("megactx/stages/unigram.py", "configs/stage/unigram.yaml", "conf/experiment/unigram.yaml")
    added("megactx/data/counting.py", "configs/data/counting.yaml")
    merged = tmp_path / "merged"  # Hydra takes one more folder of configs
    for name in ("configs/stage/unigram.yaml", "configs/data/counting.yaml", "conf/experiment/unigram.yaml"):
        path = merged / name.partition("/")[2]
        path.parent.mkdir(parents=True)
        path.write_text(FILES[name])
    folder = tmp_path / "run"
    settings = ["experiment=unigram", "data=counting", "data.source.texts=40", "preset.steps=20"]
    settings += ["preset.validate_every=10", "preset.warmup=1", "trainer=cpu", f"folder={folder}"]
    assert run(["--config-dir", str(merged), *settings]) == 0
    stage = importlib.import_module("megactx.stages.unigram").UnigramStage
    assert stage.load_from_checkpoint(folder / "checkpoints" / "best.ckpt", weights_only=True).logits.std() > 0
    assert float((folder / "entropy.txt").read_text().split()[0]) < 9.0


def test_the_study_that_the_page_shows_measures_and_refuses_what_is_not_allowed(added, texts, tmp_path, capsys):
    import importlib

    added("megactx/studies/share.py")
    main = importlib.import_module("megactx.studies.share").main
    assert main(["--path", str(texts), "--out", str(tmp_path / "share")]) == 0
    assert (tmp_path / "share.csv").read_text().startswith("run,carrier,span,domain,metric")
    assert "%" in capsys.readouterr().out
    assert main(["--path", str(texts), "--characters", "0"]) == 2
    assert "--characters=0 is not allowed: at least 1" in capsys.readouterr().err


def test_the_walk_of_a_document_names_functions_that_are_there_and_takes_at_most_twelve_steps():
    rows = re.findall(r"^\| (\d+) \|.*\| (.*) \|$", (DOCS / "where.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert 0 < len(rows) <= 12
    for _, cell in rows:
        for path, name in re.findall(r"`([\w/]+\.py)` `(?:\w+\.)?(\w+)`", cell):
            source = (DOCS.parent / "megactx" / path).read_text(encoding="utf-8")
            assert f"def {name}(" in source or f"class {name}(" in source, (path, name)
