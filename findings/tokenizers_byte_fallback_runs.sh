#!/usr/bin/env bash
# tokenizers 0.23.3: the ByteFallback decoder turns a whole run of byte tokens into replacement signs if one is wrong.
#
# Three good bytes of a character that are followed by one byte that begins nothing decode to four replacement signs: the
# character is lost too. Byte-level decoding of the same bytes keeps it. So a stream of such a tokenizer may not tell a
# character before the run of bytes has ended: what comes next can still take it away.
# Seen: "\u20ac" alone is one character; with a stray byte behind it, four replacement signs; Python's own decoder keeps it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check tokenizers==0.23.3
"$folder/venv/bin/python" - <<'PYTHON'
from tokenizers.decoders import ByteFallback

good = ["<0xE2>", "<0x82>", "<0xAC>"]
decoder = ByteFallback()
alone, followed = decoder.decode(good), decoder.decode([*good, "<0xBF>"])
print(ascii(alone), ascii(followed))
assert alone == "\u20ac"
assert followed == "\ufffd" * 4
assert bytes([0xE2, 0x82, 0xAC, 0xBF]).decode("utf-8", "replace") == "\u20ac\ufffd"
PYTHON
