"""The layouts of the public modded-nanogpt records: their tensors, and the pieces that their scripts compute with.

Data alone. A record is the one before it with what it changed, as README.md's table reads; `layouts.py` finds sizes
in the tensors, `script.py` tells records apart that share every tensor, `model.py` computes.

A tensor's name may hold a place: {block}, {attention}, {mlp}, {gated} (the blocks that have these), {value} and {skip}
(their numbers). A shape is written in sizes: V rows of the embedding, W rows of the head, d width, L blocks, H heads of
hd, n = L/2, P, R, S, m sizes of their own. `4d` is four times d, `>5L` at least 5 L; `[]` is a single number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

Keys = Mapping[str, str]

SMALL, MEDIUM, LARGE = "2025-05-30_noallreduce", "medium_2025-04-16_Record7", "ipa_large_lite"


@dataclass(frozen=True, kw_only=True)
class Record:
    """What one record's script saves and computes. README.md has the formulas of the pieces.

    `scalars`: what the tensor of that name holds, in order, as (what, how many). `skips`: block → (number of the
    weight, block whose output is added before it), or `unet`. `values`: block (negative: from the end) → value
    embedding. `windows`: long and short in blocks of 128 tokens, of validation. `yarn`: the windows (in blocks) that
    training went through, each change after the share `yarn_at` of the scheduled iterations.
    """

    name: str
    new: str
    keys: Keys
    scalars: tuple[tuple[str, str], ...] = ()
    program: Literal["blocks", "two lanes", "flat lanes", "one lane"] = "blocks"
    depth: int | None = None  # None: any even number from `least_depth` on
    least_depth: int = 2
    no_attention: tuple[int, ...] = ()
    no_mlp: tuple[int, ...] = ()
    not_run: tuple[int, ...] = ()
    # Embedding and head.
    table: str = "embed.weight"
    embedding_norm: bool = True
    head_rows: Literal["any", "padded", "same"] = "any"
    tied: bool = False
    split: Literal["", "any", "odd"] = (
        ""  # before this step, which may have to be odd, the head's rows are the embedding
    )
    cap: str = ""
    # The residual stream.
    activation: Literal["relu²", "gelu"] = "relu²"
    depth_scaled: bool = False
    skips: Literal["", "unet"] | Mapping[int, tuple[int, int]] = ""
    sigmoid_skips: bool = False
    skip_gate: bool = False
    backout: int | None = None
    last_mix: int | None = None  # the block whose output is mixed into the last one's
    last_smear: bool = False
    smear: bool = False
    bigram: Literal["", "plain", "sign"] = ""
    mudd: Literal["", "dense", "recursive", "gated"] = ""
    # Attention.
    head_size: int = 128  # where neither script nor tensors say it
    query_key_norm: bool = True
    input_norm: bool = True
    value_norm: bool = False
    value_mix: Literal["", "half", "lamb", "M2", "M4", "M5"] = ""
    values: Literal["", "each", "mirrored"] | Mapping[int, int] = ""
    value_gate: Literal["input", "6+6 unpaired", "6+6"] = "input"
    rotary: Literal["F", "H", "I"] = "F"
    scale: float | Literal["head", "yarn"] = "head"
    yarn: tuple[int, ...] = ()
    yarn_at: tuple[float, ...] = (1 / 3, 2 / 3, 1.0)
    gate: Literal["", "attn_gate", "dampen", "bank"] = ""
    offset: Literal["", "O1", "O2"] = ""
    paired: tuple[int, ...] = ()
    xsa: tuple[int, ...] = ()
    # What training saw of a sequence.
    documents: bool = True
    window: Literal["", "tokens", "blocks", "flash"] = ""
    windows: tuple[int, int] = (0, 0)
    last_window: int = 0  # of the last block alone
    long: tuple[int, ...] | None = None  # None: all
    pattern: int = 0  # blocks after which `long` repeats

    @property
    def track(self) -> str:
        """`medium` or `small`."""
        return "medium" if self.name.startswith(("medium", "ipa")) else "small"


def layers_with_values(record: Record, depth: int) -> dict[int, int]:
    """Block with attention → its value embedding."""
    if record.values == "each":
        return {i: i for i in range(depth)}
    if record.values == "mirrored":
        return {i: min(i, depth - 1 - i) for i in range(depth)}
    if not record.values:
        return {}
    found = {i % max(depth, 1): table for i, table in record.values.items()}
    return {i: found[i] for i in sorted(found) if i not in record.no_attention}


def skip_connections(record: Record, depth: int) -> dict[int, tuple[int, int]]:
    """Block → (number of its skip weight, the block whose output is added before it)."""
    if record.skips == "unet":
        half = depth // 2
        return {half + i: (i, half - 1 - i) for i in range(half)}
    return dict(record.skips) if record.skips else {}


def undefined_depth(record: Record, depth: int) -> str | None:
    """Why the record's arithmetic is not defined for `depth` blocks."""
    if record.depth is not None and depth != record.depth:
        return f"{record.name} has {record.depth} blocks, not {depth}"
    if (record.skips and record.depth is None and depth % 2) or depth < record.least_depth:
        even = "an even number of blocks" if record.skips else "blocks"
        return f"a GPT of {record.name} has {even}, at least {record.least_depth}, not {depth}"
    return None


def _next(before: Record, name: str, new: str, *drop: str, add: Keys | None = None, **pieces: object) -> Record:
    """The record after `before`: without the tensors whose names begin with one of `drop`, with those of `add`."""
    keys = {key: shape for key, shape in before.keys.items() if not key.startswith(drop)} if drop else before.keys
    return replace(before, name=name, new=new, keys={**keys, **(add or {})}, **pieces)  # type: ignore[arg-type]


def _of(place: str, prefix: str = "blocks", **tensors: str) -> dict[str, str]:
    """Tensors of blocks, whose names are written with _ for the dots within them."""
    return {f"{prefix}.{{{place}}}.{name.replace('__', '.')}": shape for name, shape in tensors.items()}


_H = "transformer.h"
_VALUES = {"value_embeds.{value}.weight": "V d"}
_TOP = {"transformer.wte.weight": "V d", "lm_head.weight": "W d"}
_EMBED = {"embed.weight": "V d", "lm_head.weight": "W d"}
_QKV = {
    "attn__c_q__weight": "d d",
    "attn__c_k__weight": "d d",
    "attn__c_v__weight": "d d",
    "attn__c_proj__weight": "d d",
}
_MLP = {"mlp__c_fc__weight": "4d d", "mlp__c_proj__weight": "d 4d"}
_ANGLES = {"attn__rotary__inv_freq": "hd/2"}
_ATTN, _MLPS = "blocks.{attention}.attn.", "blocks.{mlp}.mlp."
_MEDIUM_LONG = (0, 4, 11, 15)
_MEDIUM_SKIPS = {9: (6, 6), 10: (4, 4), 11: (2, 2)}
_ENDS = {0: 0, 1: 1, 2: 2, -3: 0, -2: 1, -1: 2}
_FIVE = {**{i: i for i in range(5)}, **{i - 5: i for i in range(5)}}
_SHIFTED = {1: 0, 2: 1, -3: 2, -2: 3, -1: 4}
_FLAT = (("skip", "L"), ("lambdas", "2L"), ("values", "2L"))
_ONES = (("smear", "1"), ("backout", "1"), ("skip", "1"))
_SCALES = {f"_mlp_down_{each}_scales": "12" for each in ("act", "proj", "proj_next")}
_BANKS = {"qk_bank": "P 2hd d", "vo_bank": "S d d"}
_MUDD = {"mudd_w1": "2 64 d", "mudd_w2": "2 14 64", "mudd_b2": "2 14"}


# fmt: off
def _gpt2_names() -> list[Record]:
    """2024, while the tensors had GPT-2's names."""
    muon = Record(
        name="2024-10-10_Muon", new="the first: GELU; q, k, v in one matrix; each output of attention × 1/√(2L)",
        keys={**_TOP, **_of("block", _H, attn__c_attn__weight="3d d", attn__c_proj__weight="d d", **_ANGLES, **_MLP)},
        table="transformer.wte.weight", embedding_norm=False, tied=True, activation="gelu", depth_scaled=True,
        query_key_norm=False, documents=False, head_rows="same", head_size=64,
    )
    modern = replace(
        muon, name="2024-10-14_ModernArch", new="q and k are normed, relu²",
        keys={**_TOP, **_of("block", _H, **_QKV, **_MLP)}, activation="relu²", depth_scaled=False, query_key_norm=True,
        head_size=128,
    )
    untied = _next(modern, "2024-11-03_UntieEmbed", "head untied, embedding normed", tied=False, embedding_norm=True)
    half = _next(untied, "2024-11-06_ShortcutsTweaks", "half of v is the first block's", value_mix="half")
    lamb = _next(
        half, "2024-11-08_CastBf16", "λ x + λ' x0; that half is learned; cap 30 tanh(z/30)",
        add=_of("block", _H, lambdas="2", attn__lamb="[]"), value_mix="lamb", cap="T30",
    )
    unet = _next(lamb, "2024-11-10_UNetDoubleLr", "U-net skips", add={"skip_weights": "n"}, skips="unet")
    flex = _next(
        unet, "2024-11-19_FlexAttention", "documents see themselves alone; a window, in tokens",
        documents=True, window="tokens", windows=(1024, 1024),
    )
    vte = _next(
        flex, "2024-12-04_ValueEmbed", "value embeddings, one to a block", windows=(1792, 1792), values="each",
        add={"transformer.vte.weight": "V Ld", **_of("block", _H, **_ANGLES)},
    )
    mirrored = _next(
        vte, "2024-12-08_UNetValueEmbedsTweaks", "the value embeddings of the second half are the first's, mirrored",
        f"{_H}.{{block}}.attn.lamb", "transformer.vte", values="mirrored", value_mix="M2",
        add={"transformer.vte.weight": "V nd", **_of("block", _H, attn__lambdas="2")},
    )
    return [muon, modern, untied, half, lamb, unet, flex, vte, mirrored]


def _twelve_blocks(last: Record) -> list[Record]:
    """From December 2024 to December 2025."""
    values = {"value_embeds.embed.{value}.weight": "V d"}
    mfu = replace(
        last, name="2024-12-10_MFUTweaks", new="blocks.N; a table to each value embedding; windows in blocks of 128",
        keys={
            **_EMBED, "skip_weights": "n", **values,
            **_of("block", lambdas="2", attn__lambdas="2", **_MLP, **_QKV, **_ANGLES),
        },
        table="embed.weight", window="blocks", windows=(14, 14),
    )
    sparse = replace(
        mfu, name="2024-12-17_SparsifyEmbeds", new="half-truncated rotary; no attention in block 7; 3 value embeddings",
        keys={
            **_EMBED, "skip_weights": "n", **values, **_of("block", lambdas="2", **_MLP),
            **_of("attention", attn__lambdas="2", **_QKV),
        },
        depth=12, no_attention=(7,), least_depth=6, rotary="H", values=_ENDS, head_rows="padded",
    )
    soft = _next(sparse, "2025-01-04_SoftCap", "cap 15 tanh(z/15); no padding of the head", cap="T15", head_rows="same")
    fp8 = _next(sparse, "2025-01-13_Fp8LmHead", "cap 30 σ(z/7.5)", cap="S30")
    merged = _next(
        fp8, "2025-01-16_Sub3Min", "q, k, v in one tensor; scale 0.12; long and short windows",
        f"{_ATTN}c_q", f"{_ATTN}c_k", f"{_ATTN}c_v", add=_of("attention", attn__qkv_w="3 d d"), head_rows="any",
        scale=0.12, windows=(14, 7), long=(0, 4, 7, 11),
    )
    rule = _next(merged, "2025-02-01_RuleTweak", "value_embeds.N", "value_embeds", add=_VALUES)
    stable = _next(rule, "2025-05-24_StableTorch", "cap 30 σ(z/(7.5√d))", cap="S30d")
    small = _next(
        stable, SMALL, "all scalars in one tensor: `gpt_small`",
        "skip_weights", "blocks.{block}.lambdas", "blocks.{attention}.attn.lambdas",
        add={"scalars": ">5L"}, scalars=_FLAT, depth=None,
    )
    triton = _next(
        small, "2025-07-18_TritonMuon", "the output matrix beside q, k, v; bare MLP, read the other way round",
        _ATTN, "blocks.{block}.mlp", depth=12,
        add={**_of("attention", attn__qkvo_w="4 d d"), **_of("mlp", mlp__c_fc="d 4d", mlp__c_proj="d 4d")},
    )
    dampen = _next(
        triton, "2025-08-23_SparseAttnGate", "each head's output × σ(dampen · its input)",
        add=_of("attention", attn__dampen__weight="H d/64"), gate="dampen", cap="S30",
    )
    fa3 = _next(
        dampen, "2025-09-03_FA3", "that gate reads 12 numbers; windows without blocks (FA3)", f"{_ATTN}dampen",
        add=_of("attention", attn__attn_gate__weight="H 12"), gate="attn_gate", window="flash", windows=(11, 5),
    )
    skipped = _next(fa3, "2025-09-05_SkipMLPBlocks", "block 0 without MLP", no_mlp=(0,))
    yarn = _next(skipped, "2025-09-10_Yarn", "YaRN", yarn=(3, 7, 11, 13), scale="yarn", windows=(13, 6))
    sigmoid = _next(yarn, "2025-09-11_VectSigmoidBFloat16", "skips × σ(weight)", sigmoid_skips=True, last_window=20)
    smear = _next(
        sigmoid, "2025-09-18_Smear", "smear", "scalars", smear=True, scalars=(*_FLAT, ("smear", "L")),
        add={"smear_gate.weight": "1 12", "scalars": ">6L"},
    )
    dropped = _next(
        smear, "2025-09-21_DropAttn", "block 0 is not run", no_attention=(0, 7), not_run=(0,), windows=(20, 6),
        last_window=0, long=(4, 11), skips={6: (0, 5), 7: (1, 4), 8: (2, 3), 9: (3, 2), 10: (4, 1)},
    )
    viewed = _next(
        dropped, "2025-09-23_MuonCustomSizing", "qkvo_w as [d, 4d]", add=_of("attention", attn__qkvo_w="d 4d"),
    )
    backout = _next(
        viewed, "2025-10-04_Backout", "backout of block 8", "scalars", add={"scalars": ">5L+2"}, backout=8,
        scalars=(*_FLAT, *_ONES[:2]),
    )
    refined = _next(backout, "2025-11-18_RefineSkip", "one skip, from block 4 into 7", skips={7: (1, 4)})
    rows = _next(
        refined, "2025-12-11_NorMuonOptimsAndFixes", "qkvo_w as [4d, d], MLP as [4d, d]; λ on q, k, v and the output",
        add={**_of("attention", attn__qkvo_w="4d d"), **_of("mlp", mlp__c_fc="4d d", mlp__c_proj="4d d")},
        value_mix="M4",
    )
    return [
        mfu, sparse, soft, fp8, merged, rule, stable, small, triton, dampen, fa3, skipped, yarn, sigmoid, smear,
        dropped, viewed, backout, refined, rows,
    ]


def _eleven_blocks(last: Record) -> list[Record]:
    """From December 2025 on."""
    partial = _next(
        last, "2025-12-14_PartialKeyOffset", "11 blocks; keys of the token before; block 6: a skip, no attention",
        "scalars", add={"scalars": ">4L+3"}, scalars=(("resid", "L"), ("x0", "L"), ("values", "2L"), *_ONES), depth=11,
        no_attention=(6,), no_mlp=(), not_run=(), backout=7, skips={6: (0, 3)}, offset="O1", long=(3, 10),
        values={0: 1, 1: 2, -3: 0, -2: 1, -1: 2},
    )
    retied = _next(
        partial, "2025-12-19_RetieLMHead", "no embedding: the head's rows", "embed.", add={"lm_head.weight": "V d"},
        table="lm_head.weight",
    )
    smoothed = _next(
        retied, "2025-12-21_SmoothedScalars", "x0_lambdas", "scalars", add={"scalars": ">3L+3", "x0_lambdas": "L"},
        scalars=(("resid", "L"), ("values", "2L"), *_ONES),
    )
    mtp = _next(
        smoothed, "2025-12-22_MultiTokenPrediction", "an embedding, which after 2/3 of training is the head's no more",
        "lm_head", add=_EMBED, table="embed.weight", split="any",
    )
    rescaled = _next(mtp, "2025-12-26_LogitRescale", "cap 23 σ((z+5)/7.5)", cap="S23", split="odd")
    gates = _next(
        rescaled, "2025-12-29_VeSkipGates", "gates of value embeddings and of the skip", value_mix="M5", skip_gate=True,
        add={"skip_gate.weight": "1 12", **_of("gated", attn__value_embed_gate__weight="H 12")},
    )
    banks = _next(
        gates, "2025-12-31_GatesToCompiledAdam", "gates in banks", "blocks.{gated}", f"{_ATTN}attn_gate", gate="bank",
        add={"attn_gate_bank": "10 H 12", "ve_gate_bank": "5 H 12"},
    )
    paired = _next(
        banks, "2026-01-07_PairedHeadAttention", "paired heads; rotary of neighbours", rotary="I", paired=(0, 2, 5, 9),
    )
    unified = _next(
        paired, "2026-01-18_UnifiedOptimizers", "matrices in banks, the head transposed", "blocks.", "lm_head",
        split="", add={"attn_bank": "10 4d d", "mlp_bank": "12 2 4d d", "lm_head.weight": "d W"},
    )
    bigram = _next(
        unified, "2026-01-19_BigramHashEmbedding", "bigram embedding", "scalars", bigram="plain", offset="O2",
        add={"scalars": ">4L+3", "bigram_embed.weight": "R d"},
        scalars=(("resid", "L"), ("values", "2L"), ("bigram", "L"), *_ONES),
    )
    five = {0: 0, 1: 1, -3: 2, -2: 3, -1: 4}
    untied = _next(bigram, "2026-01-26-UntieValueEmbeddings", "five value embeddings", values=five)
    fused = _next(
        bigram, "2026-01-24_ImprovedLMHead", "five value embeddings, in one tensor", "value_embeds",
        add={"value_embeds": "5V d"}, values=five,
    )
    tuned = _next(
        fused, "2026-02-03_VeTuned", "value embeddings 0 and 1 in blocks 1 and 2; their gate reads 6 + 6 numbers",
        values=_SHIFTED, value_gate="6+6 unpaired",
    )
    lanes = _next(
        fused, "2026-02-12_ParallelResiduals", "two lanes from block 7 on", "scalars", "x0_lambdas",
        program="two lanes",
        add={"scalars": ">2L+3", "w_post": "2L 2 1", "x0_lambda": "2L", "bigram_lambda": "2L", "resid_lambda": "2L"},
        scalars=(("values", "2L"), *_ONES),
    )
    flat = _next(
        lanes, "2026-02-16_FlattenForward", "fewer λ; embeddings enter beside attention",
        "w_post", "x0_lambda", "bigram_lambda", "resid_lambda", program="flat lanes", values=_SHIFTED,
        add={"post_lambdas": "L 2 2", "x0_lambdas": "L", "bigram_lambdas": "L", "resid_lambdas": "L 2"},
        value_gate="6+6 unpaired",
    )
    simple = _next(
        flat, "2026-03-06_SimplifyHC", "one lane; from block 8 on attention reads the output of block 7",
        add={"post_lambdas": "L 2"}, program="one lane",
    )
    no_backout = (("values", "2L"), ("smear", "1"), ("skip", "1"))
    dense = _next(
        simple, "2026-04-22_MuddFormer", "MUDD: the last block's λ are computed for each token", "attn_bank", "scalars",
        add={**_BANKS, "scalars": ">2L+2", "dense_w1": "2 64 d", "dense_w2": "2 64 2 8", "dense_bs": "2 2 8"},
        mudd="dense", backout=None, scalars=no_backout,
    )
    xsa = _next(
        simple, "2026-05-07_XSAGatedLayers", "XSA", "attn_bank", add={**_BANKS, "xsa_alphas": "L H"},
        xsa=(1, 3, 4, 7, 8, 10),
    )
    sign = _next(
        simple, "2026-05-20_BigramsSignTrick", "narrow bigrams with signs, added to x0 itself",
        "attn_bank", "bigram_embed",
        add={**_BANKS, "bigram_embed.weight": "R m", "bigram_sign_table": "T m"}, bigram="sign",
    )
    gated = _next(
        sign, "2026-05-27-MuddGatedAndDC", "gates for each token; dynamic composition in block 10",
        "attn_gate_bank", "skip_gate", "x0_lambdas", "bigram_lambdas", "scalars",
        add={
            "scalars": ">2L+2", **_MUDD, "_mudd_gate_scale": "[]",
            "mudd_gate_w1": "2 64 d", "mudd_gate_w2": "2 41 64", "mudd_gate_b2": "2 41",
        },
        mudd="gated", backout=None, scalars=no_backout, xsa=(1, 3, 4, 7), value_gate="6+6",
    )
    recursive = _next(
        sign, "2026-06-11_RecursiveFromBest", "XSA; MUDD with 14 numbers; paired heads in 0 and 5 alone", "scalars",
        add={"scalars": ">2L+2", "xsa_alphas": "L H", **_MUDD}, mudd="recursive", backout=None, scalars=no_backout,
        xsa=xsa.xsa, paired=(0, 5), value_gate="6+6",
    )
    prefix = _next(
        recursive, "2026-07-13_PrefixTokenPrediction", "paired heads in 0, 2, 5, 9 again", paired=simple.paired,
    )
    down = _next(prefix, "2026-07-17_FP8DownProjection", "scales that only training reads", add=_SCALES)
    master = _next(gated, "2026-07_master", "2026-05-27's, with those scales", add=_SCALES)
    return [
        partial, retied, smoothed, mtp, rescaled, gates, banks, paired, unified, bigram, untied, fused, tuned, lanes,
        flat, simple, dense, xsa, sign, gated, recursive, prefix, down, master,
    ]


def _medium(small: Mapping[str, Record]) -> list[Record]:
    """The medium track: what it takes of the small one's records, with 16 blocks."""
    gates = small["2025-12-29_VeSkipGates"]
    target = _next(
        small["2024-12-17_SparsifyEmbeds"], "medium_2024-12-31_Target350M", "16 blocks", head_rows="any", depth=16,
    )
    merged = _next(
        small["2025-01-16_Sub3Min"], "medium_2025-01-18", "q, k, v in one tensor", depth=16, long=_MEDIUM_LONG,
    )
    decay = _next(
        small["2025-02-01_RuleTweak"], "medium_2025-02-08_WeightDecay", "value_embeds.N", depth=16, long=_MEDIUM_LONG,
    )
    tweaked = _next(
        decay, "medium_2025-03-25_ArchOptTweaks", "skips 6→9, 4→10, 2→11; attention reads x as it is, v is normed",
        add=_of("block", record="3"), input_norm=False, value_norm=True, skips=_MEDIUM_SKIPS,
    )
    medium = replace(
        tweaked, name=MEDIUM, new="all scalars in one tensor: `gpt_medium`; cap 15 z/√(z²+225)",
        keys={
            "embed.weight": "V d", "value_embeds.{value}.weight": "V d", "lm_head_w": "W d", "scalars": "5L",
            **_of("attention", attn__qkvo_w="4 d d"), **_of("mlp", mlp__fc_w="4d d", mlp__proj_w="d 4d"),
        },
        scalars=_FLAT, cap="R15", depth=None, least_depth=12,
    )
    large = replace(medium, name=LARGE, new="medium's tensors, heads of 64, 24 blocks", pattern=16, head_size=64)
    five = _next(medium, "medium_2025-08-28_Medium_NewValemb", "five value embeddings", values=_FIVE, depth=16)
    double = _next(
        five, "medium_2025-09-11_GPT2MediumX01", "two embeddings", "embed.", "scalars", table="embed1.weight",
        add={"embed1.weight": "V d", "embed2.weight": "V d", "scalars": "6L"},
        scalars=(("skip", "L"), ("lambdas", "3L"), ("values", "2L")),
    )
    reuse = _next(
        double, "medium_2025-10-04_GPT2MediumLayerReuse", "the output of block 11 is mixed into the last",
        add={"scalars": "6L+2"}, scalars=(*double.scalars, ("mix", "2")), last_mix=11,
    )
    smear = _next(
        reuse, "medium_2025-11-02-Smear-MTP", "then each position takes of the one before", add={"scalars": "6L+3"},
        scalars=(*double.scalars, ("last smear", "1"), ("mix", "2")), last_smear=True,
    )
    bulk = _next(
        gates, "medium_2025-12-31_BulkSmallTrackTransfer", "the small track's pieces; a second embedding; three skips",
        "skip_gate", "x0_lambdas", "scalars",
        add={
            "smear_gate.weight": "1 16", "embed2.weight": "V d", "skip_gates.{skip}.weight": "1 16", "x0_lambdas": "2L",
            "scalars": ">3L+5", **_of("attention", attn__attn_gate__weight="H 16"),
            **_of("gated", attn__value_embed_gate__weight="H 16"),
        },
        scalars=(("resid", "L"), ("values", "2L"), *_ONES[:2], ("skip", "3")), no_attention=(), values=_FIVE,
        backout=11, skips={9: (0, 6), 10: (1, 4), 11: (2, 2)}, windows=(27, 11), yarn_at=(1 / 12, 2 / 12, 3 / 12),
        depth=16, long=_MEDIUM_LONG,
    )
    return [target, merged, decay, tweaked, medium, large, five, double, reuse, smear, bulk]
# fmt: on


def _by_name() -> dict[str, Record]:
    found = _gpt2_names()
    found += _twelve_blocks(found[-1])
    found += _eleven_blocks(found[-1])
    small = {record.name: record for record in found}
    return small | {record.name: record for record in _medium(small)}


RECORDS: Mapping[str, Record] = _by_name()
