#!/usr/bin/env bash
# hydra-core 1.3.8: a group of which several options are chosen is missing from hydra.runtime.choices.
#
# A defaults list may choose a list of options of one group, and the command line may override it with another list. Both
# compose as documented. hydra.runtime.choices, which the documentation calls the final choice of every group, holds the
# groups with one option, also those set to null, and leaves this one out without a word: what was chosen can only be
# guessed from the composed config, or read from the overrides, which do not have what a config file chose.
# Seen: choices is {'one': 'a'}, whether the list comes from the file or from the command line; the config has both parts.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check hydra-core==1.3.8 omegaconf==2.3.1
mkdir -p "$folder/configs/one" "$folder/configs/several"
echo "x: 1" >"$folder/configs/one/a.yaml"
for name in a b c; do printf '# @package several.%s\nx: 1\n' "$name" >"$folder/configs/several/$name.yaml"; done
printf 'defaults:\n  - one: a\n  - several: [a, b]\n  - _self_\n' >"$folder/configs/config.yaml"
"$folder/venv/bin/python" - "$folder/configs" <<'PYTHON'
import sys

from hydra import compose, initialize_config_dir

with initialize_config_dir(sys.argv[1], version_base=None):
    for overrides, wanted in (([], ["a", "b"]), (["several=[b,c]"], ["b", "c"])):
        config = compose("config", overrides, return_hydra_config=True)
        assert list(config.several) == wanted, config.several
        choices = {group: name for group, name in config.hydra.runtime.choices.items() if not group.startswith("hydra/")}
        assert choices == {"one": "a"}, choices
        print(overrides or "as in the file", "composed:", list(config.several), "choices:", choices)
PYTHON
