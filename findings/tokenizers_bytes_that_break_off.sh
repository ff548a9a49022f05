#!/usr/bin/env bash
# tokenizers 0.23.3: a character that is cut off takes the whole characters before it away, where bytes are tokens.
#
# Guess before: decoding the ids of "€" and the first byte of the next one gives "€" and one U+FFFD, as Python's
# errors="replace" does, so that a text can be shown while it grows but for a U+FFFD at its end. Seen: the decoder
# ByteFallback (Llama 2, Mistral, Gemma) turns the whole run of byte tokens into U+FFFD, one a byte, "€" with it; one
# more id, and it is back. The decoder ByteLevel keeps what is whole.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tokenizers==0.23.3
cat > "$folder/decode.py" <<'PYTHON'
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

fallback = Tokenizer(models.BPE(vocab={f"<0x{i:02X}>": i for i in range(256)}, merges=[], byte_fallback=True))
fallback.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
level = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
level.decoder = decoders.ByteLevel()
for name, tokenizer, ids in (
    ("ByteFallback", fallback, list("€€".encode())),
    ("ByteLevel", level, level.encode("€€").ids),
):
    print(name, *(ascii(tokenizer.decode(ids[:count])) for count in (3, 4, 6)))
PYTHON
seen=$("$folder/venv/bin/python" "$folder/decode.py")
echo "$seen"
expected="ByteFallback '\u20ac' '\ufffd\ufffd\ufffd\ufffd' '\u20ac\u20ac'
ByteLevel '\u20ac' '\u20ac\ufffd' '\u20ac\u20ac'"
[ "$seen" = "$expected" ] || { echo "changed" >&2; exit 1; }
