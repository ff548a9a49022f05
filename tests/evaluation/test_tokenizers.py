"""Tokenizers that are read without transformers, and those that are left to it: the same token ids, the same text."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from runner.evaluation.tokenizers import load_tokenizer

TEXTS = ("Hello there, is it so ?", "", " two  spaces\n<s>new line</s>", "Ünïcode 漢字 <pad>", "it 's <|user|> n't !")


def byte_level(special=("<unk>", "<s>", "</s>", "<pad>", "<|user|>"), *, bos: bool = False) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet, "He", "ll", "Ġt"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("H", "e"), ("l", "l"), ("Ġ", "t")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def saved(directory, tokenizer: Tokenizer, **options):
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options).save_pretrained(directory)
    return directory


def edited(directory, *, drop=(), **values):
    path = directory / "tokenizer_config.json"
    config = {name: value for name, value in json.loads(path.read_text()).items() if name not in drop}
    path.write_text(json.dumps({**config, **values}))
    return directory


def ordinary(path):
    return saved(path, byte_level(), bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


def with_bos(path):
    return saved(path, byte_level(bos=True), bos_token="<s>", eos_token="</s>")


def says_add_bos(path):
    return edited(with_bos(path), add_bos_token=False, add_eos_token=True)


def older_class(path):
    return edited(with_bos(path), tokenizer_class="PreTrainedTokenizerFast")


def cuts_and_pads(path):
    tokenizer = byte_level(bos=True)
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=20, pad_token="<pad>", pad_id=3)
    return saved(path, tokenizer, eos_token="</s>")


def cleans_up(path):
    return saved(path, byte_level(), eos_token="</s>", clean_up_tokenization_spaces=True)


def lists_its_tokens(path):
    token = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    listed = {str(i): {"content": text, **token} for i, text in enumerate(["<unk>", "<s>", "</s>", "<pad>"])}
    return edited(with_bos(path), added_tokens_decoder=listed)


def beside_a_llama(path):
    saved(path, byte_level(bos=True), bos_token="<s>", eos_token="</s>")
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return path


def tokens_in_an_older_file(path):
    edited(with_bos(path), drop=("bos_token", "eos_token"))
    tokens = {"bos_token": {"content": "<s>", "lstrip": False, "rstrip": False}, "eos_token": "</s>"}
    (path / "special_tokens_map.json").write_text(json.dumps(tokens))
    return path


def a_new_special_token(path):
    return edited(with_bos(path), pad_token="<new>")


def a_token_listed_otherwise(path):
    token = {"lstrip": True, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    return edited(with_bos(path), added_tokens_decoder={"3": {"content": "<pad>", **token}})


def more_special_tokens(path):
    return edited(with_bos(path), extra_special_tokens=["<|end|>"])


def added_later(path):
    (with_bos(path) / "added_tokens.json").write_text(json.dumps({"<later>": 300}))
    return path


def words_that_are_cleaned_up(path):
    vocabulary = {token: i for i, token in enumerate(["[UNK]", "hello", "there", ",", "?", "'", "s"])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    return saved(path, tokenizer, unk_token="[UNK]", clean_up_tokenization_spaces=True)


def of_llama_2(path, **options):
    characters = [chr(code) for code in range(33, 127)]
    vocabulary = [*LLAMA_2, *(f"<0x{i:02X}>" for i in range(256)), "▁", *characters, "▁h", "▁hi", "▁▁"]
    merges = [("▁", "h"), ("▁h", "i"), ("▁", "▁")]
    LlamaTokenizer(vocab={t: i for i, t in enumerate(vocabulary)}, merges=merges, **options).save_pretrained(path)
    return path


LLAMA_2 = ("<unk>", "<s>", "</s>")


def of_llama_2_with_its_older_file(path):
    """As the files of Llama 2 itself are: a normalizer in the place of the pre-tokenizer, and bos in the template."""
    file = of_llama_2(path) / "tokenizer.json"
    content = json.loads(file.read_text())
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    content["pre_tokenizer"] = None
    content["post_processor"] = json.loads(byte_level(bos=True).to_str())["post_processor"]
    content["model"] |= {"unk_token": "<unk>", "fuse_unk": False}
    file.write_text(json.dumps(content))
    tokens = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    listed = {str(i): {"content": token, **tokens} for i, token in enumerate(LLAMA_2)}
    return edited(
        path, added_tokens_decoder=listed, legacy=True, add_bos_token=True, tokenizer_class="LlamaTokenizerFast"
    )


def of_llama_2_without_prefix(path):
    return of_llama_2(path, add_prefix_space=False)


def of_llama_2_that_names_no_tokens(path):
    return edited(of_llama_2(path), drop=("unk_token", "bos_token", "eos_token"))


def byte_level_that_says_llama(path):
    return edited(with_bos(path), tokenizer_class="LlamaTokenizer")


PLAIN = (
    ordinary, with_bos, says_add_bos, older_class, cuts_and_pads, cleans_up, lists_its_tokens, beside_a_llama,
    tokens_in_an_older_file, of_llama_2, of_llama_2_with_its_older_file, of_llama_2_without_prefix,
    of_llama_2_that_names_no_tokens, byte_level_that_says_llama,
)  # fmt: skip
ODD = (
    a_new_special_token, a_token_listed_otherwise, more_special_tokens, added_later, words_that_are_cleaned_up,
)  # fmt: skip


@pytest.mark.parametrize("write", [*PLAIN, *ODD], ids=lambda write: write.__name__)
def test_token_ids_and_text_are_those_of_transformers(write, tmp_path):
    directory = write(tmp_path / "tokenizer")
    if not (directory / "config.json").exists():
        (directory / "config.json").write_text("{}")
    found, expected = load_tokenizer(str(directory), []), AutoTokenizer.from_pretrained(directory)
    assert found.by == ("tokenizers" if write in PLAIN else "transformers")
    for text in TEXTS:
        for special in (True, False):
            ids = expected(text, add_special_tokens=special)["input_ids"]
            assert found.encode(text, special=special) == ids
            for skip in (True, False):
                assert found.decode(ids, skip_special=skip) == expected.decode(ids, skip_special_tokens=skip)
    assert found.eos_token_id == expected.eos_token_id
    assert dict(found.special_tokens) == expected.special_tokens_map
    assert found.chat_template == expected.chat_template


@pytest.mark.parametrize("where", ["config", "file"])
def test_the_chat_template_is_kept(where, tmp_path):
    directory, template = with_bos(tmp_path / "tokenizer"), "{{ bos_token }}{{ messages[0]['content'] }}"
    (directory / "config.json").write_text("{}")
    if where == "config":
        edited(directory, chat_template=template)
    else:
        (directory / "chat_template.jinja").write_text(template)
        edited(directory, chat_template="not this one")
    assert load_tokenizer(str(directory), []).chat_template == template
    assert AutoTokenizer.from_pretrained(directory).chat_template == template
