"""With a cache every record gives the logits that it gives without one, whatever windows, documents and padding."""

import pytest
import torch

import runner
from runner.families.gpt import model as gpt
from runner.families.gpt.attention import BLOCK
from runner.families.gpt.pieces import GptConfig
from runner.families.gpt.records import LARGE, RECORDS
from tests.conftest import golden_folders
from tests.gpt_files import HEAD_SIZES, record_state

VOCAB = 40


def built(name, **state):
    record, tensors = RECORDS[name], record_state(name, vocab=VOCAB)
    depth = record.depth or (24 if name == LARGE else 16 if record.track == "medium" else 12)
    config = GptConfig(
        record=record,
        vocab_size=VOCAB,
        head_rows=128 if record.head_rows == "padded" else VOCAB,
        num_layers=depth,
        model_dim=tensors[record.table].shape[1],
        head_dim=HEAD_SIZES.get(record.mudd, 8),
        yarn=record.yarn,
        **state,
    )
    return gpt.build(config, tensors, torch.float32)


def tokens(length, batch=1, seed=0):
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def differences(net, ids, prompt, steps):
    """|cached - uncached| of the logits after `prompt` tokens and after each of `steps` more, for one row."""
    whole = net(ids[:, : prompt + steps]).logits
    cache = net.new_cache(torch.zeros(1, dtype=torch.long), prompt + steps)
    found = [net.advance(ids[:, :prompt], cache)]
    found += [net.advance(ids[:, prompt + i : prompt + i + 1], cache) for i in range(steps)]
    assert found[0].dtype == torch.float32
    wanted = whole[:, prompt - 1 : prompt + steps]
    return (torch.stack(found, 1) - wanted).abs().max(), cache


@pytest.mark.slow
@pytest.mark.parametrize("name", RECORDS)
def test_every_record(name):
    net = built(name, end_of_text=3)
    # MUDD turns the rounding of its products into ten times as much; the goldens below stay within 1e-4.
    close = 1e-3 if RECORDS[name].mudd else 1e-4
    assert differences(net, tokens(20), 14, 3)[0] < close
    assert differences(net, tokens(20), 1, 3)[0] < close


# One record of each way to look back.
KINDS = [
    "2024-12-04_ValueEmbed",  # windows in tokens
    "2025-05-30_noallreduce",  # in blocks, long and short
    "2025-12-14_PartialKeyOffset",  # without blocks; keys of the token before
    "2026-01-07_PairedHeadAttention",
    "2026-07_master",
    "medium_2025-04-16_Record7",
]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "window", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(7, marks=pytest.mark.slow)]
)
def test_windows(name, window):
    record = RECORDS[name]
    sizes = gpt.chosen_windows(record, record.depth or (12 if record.track == "small" else 16), window)
    if record.window == "tokens":
        sizes = tuple(BLOCK * size for size in sizes)
    net = built(name, window=sizes)
    for prompt, steps in [(1, 3), (127, 3), (128, 2), (129, 2), (300, 3)]:
        found, cache = differences(net, tokens(310), prompt, steps)
        assert found < 1e-4, (prompt, steps)
    # Whole blocks drop out, so memory is bounded: two positions to a token where heads are paired.
    most = {"blocks": BLOCK * sizes[0], "flash": BLOCK * (sizes[0] + 1), "tokens": sizes[0] + BLOCK}[record.window]
    assert max(memory.keys.shape[2] for memory in cache.layers.values()) <= most


@torch.inference_mode()
def test_blocks_drop_out_one_by_one():
    net = built("2025-05-30_noallreduce", window=(2, 1, 2))
    ids = tokens(400)
    found, cache = differences(net, ids, 250, 140)
    assert found < 1e-4
    assert {layer: memory.keys.shape[2] for layer, memory in cache.layers.items()} == {
        layer: 2 * BLOCK if layer in (0, 4, 11) else BLOCK for layer in range(12) if layer != 7
    }


@pytest.mark.parametrize("name", [*KINDS, "2024-11-06_ShortcutsTweaks", "2026-06-11_RecursiveFromBest"])
@pytest.mark.parametrize("window", [None, (1, 1, 1)])
@torch.inference_mode()
def test_rows_of_different_lengths(name, window):
    record = RECORDS[name]
    if window and record.window == "tokens":
        window = (BLOCK, BLOCK, BLOCK)
    net = built(name, window=window if record.window else None, end_of_text=3)
    lengths, steps = [140, 131, 3, 140], 4
    ids = tokens(150, batch=4)
    longest = max(lengths)
    padding = torch.tensor([longest - length for length in lengths])
    rows = torch.stack(
        [torch.cat([torch.full((longest - n,), -1), row[:n]]) for row, n in zip(ids, lengths, strict=True)]
    )
    cache = net.new_cache(padding, longest + steps)
    found = [net.advance(rows, cache)]
    for i in range(steps):
        following = torch.stack([row[n + i] for row, n in zip(ids, lengths, strict=True)])
        found.append(net.advance(following[:, None], cache))
    found = torch.stack(found, 1)
    for row, (own, length) in enumerate(zip(ids, lengths, strict=True)):
        alone = net(own[None, : length + steps]).logits[0, length - 1 :]
        torch.testing.assert_close(found[row], alone, rtol=0, atol=1e-4)


@torch.inference_mode()
def test_several_tokens_at_once_after_others():
    for name in KINDS:
        net = built(name, end_of_text=3)
        ids = tokens(60)
        cache = net.new_cache(torch.zeros(1, dtype=torch.long), 30)  # more is fed than there was to be room for
        for start, end in [(0, 20), (20, 33), (33, 60)]:
            found = net.advance(ids[:, start:end], cache)
        torch.testing.assert_close(found, net(ids).logits[:, -1], rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", golden_folders("gpt_records"))
def test_goldens(name, golden):
    path = golden(name)
    ids = torch.load(path / "expected.pt", weights_only=True)["tokens_docs"][None]
    net = runner.load(path, device="cpu", **{"family.documents": True})
    assert differences(net, ids, 128, 2)[0] < 1e-4


@pytest.mark.parametrize("dialect", ["small", "medium"])
@torch.inference_mode()
def test_the_windows_of_the_scripts(dialect, golden):
    content = torch.load(golden(f"generate/windows_{dialect}.pt"), weights_only=True)
    path = golden(content["checkpoint"])
    for window, wanted in content["windows"].items():
        net = runner.load(path, device="cpu", **{"family.window": int(window)})
        found = net(content["ids"][None]).logits[0]
        torch.testing.assert_close(found[content["rows"]], wanted, rtol=0, atol=1e-4)
