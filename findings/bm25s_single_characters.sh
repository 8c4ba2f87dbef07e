#!/usr/bin/env bash
# bm25s 0.3.16: the default tokeniser drops every token of one character, in texts and in queries.
#
# A query of one digit or one letter has no token left. Retrieval does not say so: it returns documents with score 0 as
# if they had been found.
# Seen: "7" returns another document with score 0.0 although document 1 holds a 7; with another token_pattern it is
# document 1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check bm25s==0.3.16 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import bm25s

texts = ["one", "the answer is 7", "two"]


def best(**settings):
    index = bm25s.BM25()
    index.index(bm25s.tokenize(texts, show_progress=False, **settings), show_progress=False)
    found, scores = index.retrieve(bm25s.tokenize("7", show_progress=False, **settings), k=1, show_progress=False)
    return int(found[0, 0]), float(scores[0, 0])


plain, other = best(), best(token_pattern=r"(?u)\b\w+\b")
print("default", plain, "with single characters", other)
assert plain[1] == 0.0 and plain[0] != 1
assert other[0] == 1 and other[1] > 0
PYTHON
