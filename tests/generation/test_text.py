"""Pieces of text: certain when they are given, and together the text."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from runner.generation.text import TextStream, written
from tests.conftest import write_tokenizer

TEXT = "Grüße, 世界! 👩‍🔬 naïve — end\n\tEND of 12 €"


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """One id a byte: characters of several bytes come in parts."""
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return PreTrainedTokenizerFast.from_pretrained(directory)


@pytest.fixture(scope="module")
def pieces():
    """As Llama 2 has it: ▁ for a space, which decoding drops at the start, and bytes for what is no piece."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "▁Paris", "▁is", "a", "b"]
    tokenizer = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def decoder(tokenizer):
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def joined(stream: TextStream, ids: list[int]) -> list[str]:
    return [*(stream.add(each) for each in ids), stream.end()]


def test_joined_it_is_the_decoded_text(byte_level):
    decode, ids = decoder(byte_level), byte_level(TEXT)["input_ids"]
    for cut in range(1, 12):
        stream = TextStream(decode, ids[:cut], [])
        pieces = joined(stream, ids[cut:])
        assert "".join(pieces) == stream.text
        assert decode(ids[:cut]).rstrip("\ufffd") + stream.text == TEXT or "\ufffd" in decode(ids[:cut])
        assert "\ufffd" not in stream.text


def test_characters_come_whole(byte_level):
    ids = byte_level("€")["input_ids"]
    stream = TextStream(decoder(byte_level), [], [])
    assert joined(stream, ids) == ["", "", "€", ""]
    broken = TextStream(decoder(byte_level), [], [])
    assert joined(broken, ids[:2])[-1] == "\ufffd"


def test_a_space_at_the_start_stays(pieces):
    ids = pieces.convert_tokens_to_ids(["▁Paris", "▁is"])
    alone = TextStream(decoder(pieces), [1], [])
    assert "".join(joined(alone, ids)) in ("Paris is", " Paris is")
    after = TextStream(decoder(pieces), ids, [])
    assert joined(after, ids) == [" Paris", " is", ""]


def test_bytes_that_break_off_do_not_change_what_was_said(pieces):
    """A fallback decoder shows a whole run of bytes as broken where its last character is: what was said stays said."""
    euro = pieces.convert_tokens_to_ids(["<0xE2>", "<0x82>", "<0xAC>"])
    stream = TextStream(decoder(pieces), [5], [])
    said = joined(stream, [*euro, *euro[:1]])
    assert "".join(said) == stream.text
    assert stream.text.startswith("€")


def test_special_tokens_are_skipped(byte_level):
    ids = byte_level("ab")["input_ids"]
    assert joined(TextStream(decoder(byte_level), [], []), [2, ids[0], 2, ids[1]]) == ["", "a", "", "b", ""]


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (["END"], "Grüße, 世界! 👩‍🔬 naïve — end\n\t"),
        (["12", "END"], "Grüße, 世界! 👩‍🔬 naïve — end\n\t"),
        (["界!"], "Grüße, 世"),
        (["nowhere", "ENDs"], TEXT[2:]),
        (["e", "üße"], "Gr"),
        (["€"], TEXT[2:-1]),
    ],
)
def test_stops(byte_level, stop, text):
    ids = byte_level(TEXT)["input_ids"]
    text = text.removeprefix("Gr")
    stream = TextStream(decoder(byte_level), ids[:2], stop)
    said = ""
    for each in ids[2:]:
        said += stream.add(each)
        assert not any(one in said for one in stop)
        if stream.stopped:
            break
    said += stream.end()
    assert said == stream.text == text
    assert stream.stopped == (text != TEXT[2:])


def test_a_stop_across_pieces_never_shows_its_beginning():
    """Pieces of several characters, which end in the middle of a stop text."""
    words = ["one ", "two<", "/st", "op", ">three", "<", "/stop", ">four"]
    stream = TextStream(lambda ids: "".join(words[i] for i in ids), [], ["</stop>"])
    assert [stream.add(i) for i in range(5)] == ["one ", "two", "", "", ""]
    assert stream.stopped
    assert stream.text == "one two"
    other = TextStream(lambda ids: "".join(words[i] for i in ids), [], ["</stop!"])
    assert "".join(joined(other, list(range(8)))) == "".join(words)


def test_any_bytes_at_all(byte_level):
    numbers = random.Random(0)
    decode = decoder(byte_level)
    for _ in range(50):
        ids = [numbers.randrange(3, 259) for _ in range(20)]
        stream = TextStream(decode, [3], [])
        assert "".join(joined(stream, ids)) == stream.text
        assert stream.text.replace("\ufffd", "") == decode(ids).replace("\ufffd", "")


def test_what_a_terminal_is_given():
    assert written("a\tb\n\x1b[2Jc\x07é") == "a\tb\n\\x1b[2Jc\\x07é"
