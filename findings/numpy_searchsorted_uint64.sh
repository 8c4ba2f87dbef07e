#!/usr/bin/env bash
# numpy 2.4.6: searchsorted on an array of uint64 with a plain Python int compares as float64.
#
# `==` takes a Python int as a number of the array's own type and finds it. searchsorted makes an int64 of it, and the common
# type of uint64 and int64 is float64, which has 53 bits: ids that are made of several fields, with the highest on top, come
# out at another place, without a warning. np.uint64(id) is found.
# Seen: of three ids from 2^56 + 1 on, the second is found at place 0; as np.uint64 at place 1. It fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np

ids = np.array([2**56 + 1, 2**56 + 2, 2**56 + 3], np.uint64)
wanted = 2**56 + 2
plain, typed = int(np.searchsorted(ids, wanted)), int(np.searchsorted(ids, np.uint64(wanted)))
print(f"== finds it at {int((ids == wanted).argmax())}, searchsorted at {plain}, with np.uint64 at {typed}")
assert (ids == wanted).tolist() == [False, True, False]
assert (plain, typed) == (0, 1), (plain, typed)
PYTHON
