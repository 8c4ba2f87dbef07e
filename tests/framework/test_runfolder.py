import logging

from omegaconf import OmegaConf

from megactx.framework.callbacks.logs import CSV
from megactx.framework.run.runfolder import git_commit, hide_in_command, hide_secrets, logs, open_folder


def test_secrets_are_hidden_and_our_own_settings_are_not():
    tree = {
        "api_key": "x",
        "wandb": [{"HF_TOKEN": "x", "apikey": "x", "password": "x"}],
        "max_tokens": 8,
        "tokens": 32,
        "tokenizer": "asset:tiny-base",
        "token": None,
    }
    assert hide_secrets(tree) == {
        "api_key": "(hidden)",
        "wandb": [{"HF_TOKEN": "(hidden)", "apikey": "(hidden)", "password": "(hidden)"}],
        "max_tokens": 8,
        "tokens": 32,
        "tokenizer": "asset:tiny-base",
        "token": None,
    }
    assert hide_in_command(["+data.hf_token=x", "preset.max_tokens=8"]) == [
        "+data.hf_token=(hidden)",
        "preset.max_tokens=8",
    ]


def test_the_folder_records_command_versions_and_device(tmp_path):
    open_folder(tmp_path / "a", {"seed": 1}, ["seed=1"], "CPU; 32-true")
    record = OmegaConf.load(tmp_path / "a" / "run.yaml")
    assert record.command[-1] == "seed=1" and record.device == "CPU; 32-true" and record.git == git_commit()
    assert {"torch", "lightning", "transformers"} <= set(record.packages)
    assert OmegaConf.load(tmp_path / "a" / "config.yaml") == {"seed": 1}


def test_our_messages_go_to_the_screen_and_to_the_log_and_other_peoples_only_to_the_log(tmp_path, capsys):
    with logs(tmp_path):
        logging.getLogger("megactx.data").info("ours")
        logging.getLogger("someone.else").info("theirs")
    assert capsys.readouterr().out == "ours\n"
    said = (tmp_path / "run.log").read_text()
    assert "ours" in said and "theirs" in said


def test_the_csv_logger_goes_on_with_a_file_and_with_new_columns(tmp_path):
    for part, columns in enumerate(({"a": 1.0}, {"a": 2.0, "b": 3.0})):
        logger = CSV(str(tmp_path))
        logger.log_metrics(columns, step=part)
        logger.finalize("success")
    assert (tmp_path / "metrics.csv").read_text().split() == ["a,b,step", "1.0,,0", "2.0,3.0,1"]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.csv"]
