#!/usr/bin/env bash
# transformers 5.23.0: batch_decode of an empty batch returns one empty string, not an empty list.
#
# batch_decode hands its batch to decode, which takes an empty list for one sequence without tokens. So a batch that was
# filtered until nothing was left comes back with one row more than it had, and everything that pairs rows with texts is
# off by one.
# Seen: batch_decode([]) == [""] while batch_decode([[5]]) has one text and batch_decode([[5], [6]]) two.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check transformers==5.23.0
"$folder/venv/bin/python" - <<'PYTHON' 2>/dev/null
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

words = Tokenizer(models.WordLevel({word: n for n, word in enumerate("a b c d e f g".split())}, unk_token="a"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
found = [tokenizer.batch_decode(batch) for batch in ([], [[5]], [[5], [6]])]
print(found)
assert found == [[""], ["f"], ["f", "g"]], found
PYTHON
