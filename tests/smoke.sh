#!/usr/bin/env bash
# Every stage in miniature, each from the last, in one command: tokenizer, base, mid, sft, gist, lens, end to end, export;
# alternating and a core beside it, a page about all of them, and one chat turn.
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

mkdir -p "$OUT"
RUN=$OUT/run10
step "the chain" run10 "$PYTHON" train.py experiment=run10 preset=smoke trainer=cpu "folder=$RUN"
step "in turn" alternating "$PYTHON" train.py experiment=alternating preset=smoke trainer=cpu \
    "folder=$OUT/alternating" "base.name=$RUN/run10_sft/model" "stage.gistnet=$RUN/run10_gist" "stage.init=$RUN/run10_lens"
step "a core" core "$PYTHON" train.py experiment=cognitive_core preset=smoke preset.steps=4 preset.warmup=1 preset.validate_every=2 \
    trainer=cpu datamodule.batch=2 datamodule.validation_questions=2 stage.evaluate.questions=4 "folder=$OUT/core"
grep -q "What each stage gained" "$RUN/report.md" || { echo "smoke: the page is not there"; exit 3; }
echo "What is a gist?" | "$PYTHON" -m megactx.apps.chat --model "$RUN/run10_export/model" --tokens 16 >"$OUT/chat.log" 2>&1 ||
    { tail -20 "$OUT/chat.log"; echo "smoke: the chat failed"; exit 3; }
grep -q . "$OUT/chat.log" || { echo "smoke: the chat said nothing"; exit 3; }
echo "smoke: all of it in $((SECONDS - began)) s"
