"""Token shards of modded-nanogpt: read as they were written, and refused where they lie."""

import struct

import numpy as np
import pytest
import torch

from runner.data.shards import find_shards, open_shard, read_shards, sequences
from runner.errors import ConfigError
from tests.shard_files import write_shard


def by_hand(tokens, magic=20240520, version=1, count=None):
    """The bytes of a shard, packed without the module under test."""
    header = [magic, version, len(tokens) if count is None else count] + [0] * 253
    return struct.pack("<256i", *header) + struct.pack(f"<{len(tokens)}H", *tokens)


def test_layout(tmp_path):
    tokens = [0, 1, 258, 50256, 65535]
    (tmp_path / "hand.bin").write_bytes(by_hand(tokens))
    write_shard(tmp_path / "ours.bin", tokens)
    assert (tmp_path / "ours.bin").read_bytes() == (tmp_path / "hand.bin").read_bytes()
    mapped = open_shard(tmp_path / "hand.bin")
    assert isinstance(mapped, np.memmap)
    assert mapped.tolist() == tokens
    found = read_shards(tmp_path / "hand.bin", 100)
    assert (found.dtype, found.tolist()) == (torch.int64, tokens)


def test_shards_follow_one_another_up_to_the_limit(tmp_path):
    for name, tokens in (("b.bin", [4, 5, 6]), ("a.bin", [1, 2, 3]), ("c.bin", [7])):
        write_shard(tmp_path / name, tokens)
    (tmp_path / "notes.txt").write_text("no shard")
    for place in (tmp_path, str(tmp_path / "*.bin"), f"{tmp_path}/[abc].bin"):
        assert read_shards(place, 100).tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert read_shards(tmp_path, 5).tolist() == [1, 2, 3, 4, 5]
    assert read_shards(tmp_path, 3).tolist() == [1, 2, 3]
    (tmp_path / "b.bin").write_bytes(b"")
    assert read_shards(tmp_path, 3).tolist() == [1, 2, 3]  # what is not needed is not opened
    write_shard(tmp_path / "[x].bin", [9])
    assert [path.name for path in find_shards(tmp_path / "[x].bin")] == ["[x].bin"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "has 0 bytes, less than the 1024"),
        (by_hand([1, 2])[:1000], "has 1000 bytes, less than"),
        (by_hand([1, 2, 3])[:-1], "truncated: 3 tokens make 1030 bytes, the file has 1029"),
        (by_hand([1, 2], count=2_000_000_000), "truncated: 2000000000 tokens"),
        (by_hand([1, 2]) + b"xx", "not what its header says: 2 tokens make 1028 bytes, the file has 1030"),
        (by_hand([1, 2], count=-5), "not what its header says: -5 tokens"),
        (by_hand([]), "0 tokens"),
        (by_hand([1], magic=20240521), "no token shard: its first number is 20240521, not 20240520"),
        (by_hand([1], version=2), "version 2; only version 1"),
        (b"PK\x03\x04" + bytes(2000), "no token shard"),
    ],
)
def test_files_that_are_no_shard(content, says, tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_shards(path, 10)
    assert says in str(caught.value)
    assert str(caught.value).startswith(f"data.path={path}: ")


def test_no_shards_there(tmp_path):
    for place in (tmp_path, tmp_path / "none.bin", tmp_path / "*.bin"):
        with pytest.raises(ConfigError, match="no token shards there"):
            read_shards(place, 10)
    write_shard(tmp_path / "a.bin", [1])
    with pytest.raises(ConfigError, match="max_tokens=0"):
        read_shards(tmp_path, 0)


def test_ids_beyond_the_vocabulary(tmp_path):
    write_shard(tmp_path / "a.bin", [1, 2, 3])
    write_shard(tmp_path / "b.bin", [4, 24, 500])
    assert read_shards(tmp_path, 4, vocab_size=24).tolist() == [1, 2, 3, 4]
    with pytest.raises(ConfigError, match=r"b\.bin: token 1 has the id 24, but the model's vocabulary has 24"):
        read_shards(tmp_path, 5, vocab_size=24)
    with pytest.raises(ValueError, match="0 to 65535"):
        write_shard(tmp_path / "c.bin", [65536])


def test_sequences():
    tokens = torch.arange(9)
    assert [piece.tolist() for piece in sequences(tokens, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [len(piece) for piece in sequences(tokens, 5)] == [5, 4]
