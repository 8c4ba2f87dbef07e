#!/usr/bin/env bash
# Every stage in miniature, each from the last: tokenizer, base, gist, lens, alternating, end to end, export, one chat turn.
# Usage: tests/smoke.sh [FOLDER]; what it makes is no model that is good for anything.
set -euo pipefail
PYTHON=${PYTHON:-.venv/bin/python}
OUT=${1:-$(mktemp -d)}
trap '[ $# -gt 0 ] || rm -rf "$OUT"' EXIT
began=$SECONDS

step() { # what, log, command...
    local what=$1 log=$OUT/$2.log from=$SECONDS
    shift 2
    if ! "$@" >"$log" 2>&1 </dev/null; then
        tail -20 "$log"
        echo "smoke: $what failed"
        exit 3
    fi
    echo "smoke: $what, $((SECONDS - from)) s"
}
train() { # what, name, overrides...
    local what=$1 name=$2
    shift 2
    step "$what" "$name" "$PYTHON" train.py debug=limit "folder=$OUT/$name" trainer=cpu "$@"
}

mkdir -p "$OUT"
BASE=(base=hf "base.name=$OUT/base/model" preset=demo)
train tokenizer tokenizer experiment=tokenizer stage.vocab_size=1024 stage.sample_bytes=1000000
train "base LM" base experiment=base_lm preset=demo "base.name=$OUT/tokenizer/tokenizer" stage.config.vocab_size=1024 \
    stage.config.hidden_size=64 stage.config.intermediate_size=128 stage.config.num_hidden_layers=2 \
    'datamodule.phases=[{steps: 4, tokens: 512, batch: 2}]'
train GistNet gist experiment=demo "${BASE[@]}"
train LensNet lens experiment=lens "${BASE[@]}" "stage.gistnet=$OUT/gist"
train "in turn" alternating experiment=alternating "${BASE[@]}" "stage.gistnet=$OUT/gist" "stage.init=$OUT/lens"
train "end to end" end_to_end experiment=end_to_end "${BASE[@]}" "stage.gistnet=$OUT/gist" "stage.init=$OUT/lens"
step export export "$PYTHON" -m megactx.stages.export "$OUT/end_to_end" "$OUT/model"
echo "What is a gist?" | "$PYTHON" -m megactx.apps.chat --model "$OUT/model" --tokens 16 >"$OUT/chat.log" 2>&1 ||
    { tail -20 "$OUT/chat.log"; echo "smoke: the chat failed"; exit 3; }
grep -q . "$OUT/chat.log" || { echo "smoke: the chat said nothing"; exit 3; }
echo "smoke: all of it in $((SECONDS - began)) s"
