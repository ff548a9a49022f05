#!/usr/bin/env bash
# torch 2.13.0: the legacy file format saves tensors of newer dtypes and cannot load its own files.
#
# Guess before: what torch.save writes with _use_new_zipfile_serialization=False, torch.load reads, as it does for float32
# and bfloat16; or the saving is refused. Seen: for uint16, uint32, uint64 and float8 saving succeeds without a word, and
# loading the file raises AttributeError, with weights_only=True and mmap off, the defaults. Under the zip format all of
# them come back. Whoever archives quantised weights in the old format finds out when they are needed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$folder/seen.py" <<'PYTHON'
import io

import torch


def again(dtype, *, as_zip):
    file = io.BytesIO()
    torch.save({"w": torch.ones(4).to(dtype)}, file, _use_new_zipfile_serialization=as_zip)
    file.seek(0)
    try:
        return "equal" if torch.load(file)["w"].dtype == dtype else "another dtype"
    except Exception as error:
        return type(error).__name__


NEWER = (torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2)
print(f"torch {torch.__version__}: saved, then loaded")
seen = {dtype: (again(dtype, as_zip=False), again(dtype, as_zip=True)) for dtype in (torch.float32, torch.bfloat16, *NEWER)}
for dtype, (legacy, as_zip) in seen.items():
    print(f"  {str(dtype):<20} legacy: {legacy:<15} zip: {as_zip}")
expected = {dtype: ("AttributeError" if dtype in NEWER else "equal", "equal") for dtype in seen}
assert seen == expected, f"changed: {[str(dtype) for dtype in seen if seen[dtype] != expected[dtype]]}"
PYTHON
"$folder/venv/bin/python" "$folder/seen.py"
