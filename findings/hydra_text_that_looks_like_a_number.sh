#!/usr/bin/env bash
# hydra-core 1.3.8, omegaconf 2.3.1: a field typed `str` does not keep the text that was typed.
#
# Guess before: for a `str` field the override's characters are the value. Seen: Hydra's grammar makes a number of every
# word that can be one, and OmegaConf writes that number out again as text. So a run named after an abbreviated commit
# (seven hex digits, about one in fifty of them digits around one `e`) gets another name, `1_000` loses its underscore,
# and a large exponent becomes `inf`. `007` and `0x1f` stay as they are. Quotes inside the override keep the text.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet hydra-core==1.3.8 omegaconf==2.3.1
cat > "$folder/seen.py" <<'PYTHON'
from dataclasses import dataclass
from importlib.metadata import version

from hydra import compose, initialize
from hydra.core.config_store import ConfigStore


@dataclass
class Config:
    name: str = ""


ConfigStore.instance().store(name="text", node=Config)
EXPECTED = {
    "12345e7": "123450000000.0",
    "1234e05": "123400000.0",
    "9876e543": "inf",
    "1_000": "1000",
    "1.50": "1.5",
    "007": "007",
    "0x1f": "0x1f",
    "'12345e7'": "12345e7",
}
print(f"hydra-core {version('hydra-core')}, omegaconf {version('omegaconf')}: name=… for a field `name: str`")
with initialize(config_path=None, version_base="1.3"):
    seen = {typed: compose("text", overrides=[f"name={typed}"]).name for typed in EXPECTED}
for typed, value in seen.items():
    print(f"  name={typed:<10} gives {value!r}")
assert seen == EXPECTED, f"changed: {[typed for typed in seen if seen[typed] != EXPECTED[typed]]}"
PYTHON
"$folder/venv/bin/python" "$folder/seen.py"
