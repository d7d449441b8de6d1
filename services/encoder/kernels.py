"""The sums of `attention.column_sums` on an NVIDIA GPU: flash-style kernels, for packed sequences.

    score[l] = mean over heads of the sum over a segment's queries of A      # A: probabilities, never stored

Two passes, each with one program per tile of one head of one segment. The first gives each query the
log-sum-exp of its logits, as flash attention's forward does; where that is at hand, it is left out. The
second gives each key its probabilities, summed over the queries. A third, small kernel takes the mean over
heads. What the passes allocate is O(heads · n) float32.

Deterministic, and a segment scores the same bits alone as beside others: no atomics; tiles start where their
segment starts; tile sizes depend on dtype and head_dim alone; and heads are added in one order, which torch's
own mean over a dimension does not promise for different n.

Knows tensors and Triton; nothing of towers, images or when to capture. Importing this module imports no
Triton, which hosts without a GPU lack: `probe` says whether the kernels run here, and why not. Triton 3.6 or
newer (torch 2.11's).
"""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, no_type_check

import torch
from torch import Tensor

from hiprune.errors import Unsupported

HEAD_DIMS: Final = (64, 72, 80, 128)
DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)

_CAPABILITY: Final = (8, 0)  # Ampere: bf16 products and asynchronous copies
_LOG2E: Final = math.log2(math.e)
_MEAN_TILE: Final = 512


@dataclass(frozen=True)
class _Launch:
    """How the passes are cut: `tile` rows stay in a program, `step` columns at a time stream past them."""

    tile: int
    step: int
    warps: int
    stages: int

    def constants(self, head_dim: int, unit: int) -> dict[str, Any]:
        """What is compiled into a pass: one variant per dtype, head_dim and `unit`, whatever the lengths."""
        return {
            "HEAD_DIM": head_dim,
            # 72 and 80 are 64 and a rest of 16: padded to 128, products would cost 1.6 times as much.
            "LOW": 128 if head_dim == 128 else 64,
            "HIGH": 16 if head_dim in (72, 80) else 0,
            "UNIT": unit,
            "TILE": self.tile,
            "STEP": self.step,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


# Chosen by reasoning and by what the compiler reports for sm_80 and sm_90, not tuned while requests wait: an
# autotuner would run every candidate at the first request of each shape, and might choose differently on two
# replicas, whose scores then differ in a bit.
#
# With 16-bit inputs exp2 limits as much as products do. A tile of 128 × 64 logits takes 8192 / 16 = 512
# cycles of an SM's special function units, and at head_dim 80 its products take 320 cycles of an H100's
# tensor cores or 640 of an A100's: programs must overlap on an SM. So 4 warps, with which 2 to 5 fit (about
# 170 registers a thread on sm_80 and up to 128 on sm_90, nothing spilled; 34 to 82 KB of shared memory), and
# not 8 and 128 × 128. 128 rows and not 64 halve what streams from L2: 10 KB a tile. Windows of 64 tokens
# leave half of such a tile empty, but a tile chosen by length would score a segment differently alone and in
# a batch.
_HALF: Final = _Launch(tile=128, step=64, warps=4, stages=3)
# float32 not rounded to TF32 runs on the ordinary units, which take whole operands into registers: at
# head_dim 128 even 64 × 32 spills 4 KB a thread. Meant for
# parity checks: who serves from such a GPU takes 16 bits.
_SINGLE: Final = _Launch(tile=32, step=32, warps=4, stages=2)


def _launch(dtype: torch.dtype) -> _Launch:
    return _SINGLE if dtype == torch.float32 else _HALF


def supports(head_dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `column_sums` takes such inputs; that the kernels also compile here is for `probe` to say."""
    return head_dim in HEAD_DIMS and dtype in DTYPES and _refusal(device) is None


def available() -> bool:
    """Whether Triton can be imported and finds a C compiler at run time, or what that would make."""
    return _absence() is None


def probe(device: torch.device, *, head_dim: int = 64, dtype: torch.dtype = torch.bfloat16) -> str | None:
    """None if the kernels run on `device`, else the reason in one line: for the log, once, at start.

    Compiles and launches them on a small input, in seconds the first time, and checks the result; requests of
    this head_dim and dtype then find them compiled.
    """
    if reason := _refusal(device) or _absence():
        return reason
    try:
        # Equal keys receive equal attention: every score is 1, whatever the queries are.
        query = torch.linspace(-2, 2, 96 * 2 * head_dim, device=device).view(96, 2, head_dim).to(dtype)
        cu_seqlens = torch.tensor([0, 31, 96], dtype=torch.int32, device=device)
        scores = column_sums(query, torch.ones_like(query), cu_seqlens, scaling=0.125, max_seqlen=65)
        if not torch.allclose(scores, torch.ones_like(scores), atol=1e-3):
            return f"the kernels give wrong scores on {device}"
    except Exception as error:  # whatever a compiler, a driver or a device may raise
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None


@torch.no_grad()
def column_sums(
    query: Tensor,
    key: Tensor,
    cu_seqlens: Tensor,
    *,
    scaling: float,
    max_seqlen: int,
    lse: Tensor | None = None,
) -> Tensor:
    """Attention that each key receives from its own segment: summed over queries, averaged over heads.

    query, key  # (n, heads, d) packed segments; bf16, fp16 or fp32; d contiguous, other strides free
    cu_seqlens  # (S + 1,) int32 on the device: segment s is cu_seqlens[s] : cu_seqlens[s + 1], from 0 to n
    max_seqlen  # length of the longest segment or more; less would leave its end without scores
    lse         # (heads, n) float32: per query the natural log of Σ exp(scaling · logit), as flash attention
                # returns it; without it the kernels work it out, at twice the cost
    returns     # (n,) float32; a segment's scores add up to its length

    Equals `attention.eager_column_sums` of each segment within 1e-5 relative: logits, probabilities and sums
    are float32, and float32 inputs are not rounded to TF32. With logits in the hundreds that widens, as for
    any float32 softmax: a logit m is known to about m · 2⁻²³, the relative error of its probability.
    Never waits for the device, so a CUDA graph can record it once it has run on such inputs.

    Raises `Unsupported` for a head_dim or dtype that the kernels do not take, `ValueError` for tensors that
    do not fit together.
    """
    _check(query, key, cu_seqlens, lse)
    tokens, heads, head_dim = key.shape
    segments = len(cu_seqlens) - 1
    # Tokens outside all segments, which there should be none of, score 0 and not what memory held.
    sums = torch.zeros(heads, tokens, dtype=torch.float32, device=key.device)
    scores = torch.empty(tokens, dtype=torch.float32, device=key.device)
    if tokens == 0 or segments == 0:
        return scores.zero_()

    launch = _launch(key.dtype)
    # One program per tile that exists, by a table made on the device. A grid of max_seqlen / tile by segments
    # would launch half a million empty programs per head for one segment of 65536 tokens beside a thousand
    # windows; the table's bound exceeds what is needed by one tile per segment at most, and by none where
    # all are of one length.
    tiles = min(tokens // launch.tile + segments, segments * -(-max_seqlen // launch.tile))
    lengths = cu_seqlens.diff()  # (S,)
    tile_ends = ((lengths + (launch.tile - 1)) // launch.tile).cumsum(0, dtype=torch.int32)  # (S,)
    numbers = torch.arange(tiles, dtype=torch.int32, device=key.device)
    segment_of_tile = torch.searchsorted(tile_ends, numbers, right=True, out_int32=True)  # S: no such tile

    row_lse, column_sum, mean_over_heads = _kernels()
    # Triton learns from a multiple of 16 alone that rows start at whole 16 bytes, without which copies are
    # neither wide nor asynchronous; heads of 72 are apart by multiples of 8. So strides count `unit`s.
    unit = 16 // key.element_size()
    strides = (query.stride(0), query.stride(1), key.stride(0), key.stride(1))
    if any(stride % unit for stride in strides):
        unit = 1
    packed = (cu_seqlens, segment_of_tile, tile_ends, segments, tokens, *(each // unit for each in strides))
    constants = launch.constants(head_dim, unit)
    # Triton launches on the current device.
    with torch.cuda.device_of(key):  # type: ignore[no-untyped-call]  # untyped upstream
        if lse is None:
            lse = torch.empty_like(sums)
            row_lse[(tiles, heads)](query, key, lse, *packed, scaling * _LOG2E, 1 / _LOG2E, **constants)
        column_sum[(tiles, heads)](
            query, key, lse.contiguous(), sums, *packed, scaling * _LOG2E, _LOG2E, **constants
        )
        mean_over_heads[(-(-tokens // _MEAN_TILE),)](sums, scores, heads, tokens, TILE=_MEAN_TILE)
    return scores


def _check(query: Tensor, key: Tensor, cu_seqlens: Tensor, lse: Tensor | None) -> None:
    if key.ndim != 3 or query.shape != key.shape or query.dtype != key.dtype:
        raise ValueError(
            f"query {tuple(query.shape)} {query.dtype} and key {tuple(key.shape)} {key.dtype}: "
            "expected one shape (n, heads, d) and one dtype"
        )
    if key.shape[-1] not in HEAD_DIMS:
        raise Unsupported(f"head_dim {key.shape[-1]}; the kernels take {HEAD_DIMS}")
    if key.dtype not in DTYPES:
        raise Unsupported(f"{key.dtype}; the kernels take {DTYPES}")
    if query.stride(-1) != 1 or key.stride(-1) != 1:
        raise ValueError(f"strides of d are {query.stride(-1)} and {key.stride(-1)}; expected 1")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) == 0 or cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}; expected (S + 1,) int32")
    expected = (key.shape[1], key.shape[0])
    if lse is not None and (lse.shape != expected or lse.dtype != torch.float32):
        raise ValueError(f"lse {tuple(lse.shape)} {lse.dtype}; expected {expected}, (heads, n), float32")
    if any(each.device != key.device for each in (query, cu_seqlens, lse) if each is not None):
        raise ValueError(f"query, cu_seqlens and lse must be on {key.device}, as key is")


def _refusal(device: torch.device) -> str | None:
    """Why `device` is none that the kernels are made for."""
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.hip is not None:
        return f"{device} is no NVIDIA GPU that torch can use"
    capability = torch.cuda.get_device_capability(device)
    if capability < _CAPABILITY:
        return f"{device} has compute capability {capability}; the kernels need {_CAPABILITY}"
    return None


@cache
def _absence() -> str | None:
    """What Triton lacks on this host, whatever its devices."""
    try:
        import triton  # noqa: F401
    except Exception as error:  # a broken installation raises more than ImportError
        return f"triton cannot be imported: {error}"
    # a cache of another kind may hold what a compiler would make: see `services.encoder.triton_cache`
    ready = os.environ.get("CC") or os.environ.get("TRITON_CACHE_MANAGER")
    if not (ready or shutil.which("gcc") or shutil.which("clang")):
        return "triton needs a C compiler at run time: install gcc, or name one in CC"
    return None


# --- kernels -----------------------------------------------------------------------------------------------
#
# Plain functions that `_kernels` hands to Triton, which looks up `tl` among this module's globals.

# Offsets are int64 from the first product on: 2³¹ elements are a million tokens of 16 heads.

# ruff: noqa: N803  compiled-in parameters are upper case, as in Triton's own kernels

tl: Any = None


@cache
def _kernels() -> tuple[Any, Any, Any]:
    """The three kernels, ready to launch; interpreted where TRITON_INTERPRET=1 was set before."""
    global tl  # noqa: PLW0603  closures are no way: Triton's interpreter does not see them
    import triton
    import triton.language

    tl = triton.language
    # No variants for numbers that are 1 or that 16 divides, or for where a small tensor starts: a request
    # would wait for their compiler. What matters is in UNIT.
    strides = ["query_token", "query_head", "key_token", "key_head"]
    table = ["cu_seqlens", "segment_of_tile", "tile_ends"]
    return (
        triton.jit(
            _row_lse,
            do_not_specialize=["segments", "tokens", *strides],
            do_not_specialize_on_alignment=["lse", *table],
        ),
        triton.jit(
            _column_sum,
            do_not_specialize=["segments", "tokens", *strides],
            do_not_specialize_on_alignment=["lse", "sums", *table],
        ),
        triton.jit(
            _mean_over_heads,
            do_not_specialize=["heads", "tokens"],
            do_not_specialize_on_alignment=["sums", "scores"],
        ),
    )


@no_type_check  # Triton reads annotations, and understands its own alone
def _row_lse(
    query,  # (n, heads, d)
    key,  # (n, heads, d)
    lse,  # out: (heads, n) float32, natural logarithm
    cu_seqlens,  # (S + 1,) int32
    segment_of_tile,  # (tiles,) int32
    tile_ends,  # (S,) int32: tiles up to the end of each segment
    segments,
    tokens,
    query_token,  # strides, in UNITs
    query_head,
    key_token,
    key_head,
    factor,  # scaling · log2 e
    ln2,
    HEAD_DIM: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    UNIT: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    """One tile of queries of one head against all keys of its segment, a step at a time."""
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    segment = tl.load(segment_of_tile + tile)
    if segment == segments:
        return
    begin = tl.load(cu_seqlens + segment)
    end = tl.load(cu_seqlens + segment + 1)
    before = tl.load(tile_ends + segment) - tl.cdiv(end - begin, TILE)  # tiles of earlier segments

    rows = begin + (tile - before) * TILE + tl.arange(0, TILE)
    is_row = rows < end
    low = tl.arange(0, LOW)
    high = LOW + tl.arange(0, 16)
    row = query + head * query_head * UNIT + (rows.to(tl.int64) * query_token)[:, None] * UNIT
    query_low = tl.load(row + low[None, :], mask=is_row[:, None], other=0.0)
    if HIGH:
        query_high = tl.load(
            row + high[None, :], mask=is_row[:, None] & (high < HEAD_DIM)[None, :], other=0.0
        )

    highest = tl.full((TILE,), float("-inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)  # Σ 2^(logit − highest)
    for start in range(begin, end, STEP):
        columns = start + tl.arange(0, STEP)
        is_column = columns < end
        column = key + head * key_head * UNIT + (columns.to(tl.int64) * key_token)[:, None] * UNIT
        key_low = tl.load(column + low[None, :], mask=is_column[:, None], other=0.0)
        logits = tl.dot(query_low, tl.trans(key_low), input_precision="ieee")
        if HIGH:
            key_high = tl.load(
                column + high[None, :], mask=is_column[:, None] & (high < HEAD_DIM)[None, :], other=0.0
            )
            logits = tl.dot(query_high, tl.trans(key_high), logits, input_precision="ieee")
        logits = tl.where(is_column[None, :], logits * factor, float("-inf"))
        # The first step holds a column at least, so that `highest` is finite from then on.
        higher = tl.maximum(highest, tl.max(logits, 1))
        total = total * tl.exp2(highest - higher) + tl.sum(tl.exp2(logits - higher[:, None]), 1)
        highest = higher
    tl.store(lse + head * tokens + rows, (highest + tl.log2(total)) * ln2, mask=is_row)


@no_type_check  # Triton reads annotations, and understands its own alone
def _column_sum(
    query,  # (n, heads, d)
    key,  # (n, heads, d)
    lse,  # (heads, n) float32, natural logarithm
    sums,  # out: (heads, n) float32
    cu_seqlens,  # (S + 1,) int32
    segment_of_tile,  # (tiles,) int32
    tile_ends,  # (S,) int32: tiles up to the end of each segment
    segments,
    tokens,
    query_token,  # strides, in UNITs
    query_head,
    key_token,
    key_head,
    factor,  # scaling · log2 e
    log2e,
    HEAD_DIM: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    UNIT: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    """One tile of keys of one head under all queries of its segment, a step at a time.

    Transposed, keys as rows: a sum over queries then stays within a few threads instead of crossing warps.
    """
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    segment = tl.load(segment_of_tile + tile)
    if segment == segments:
        return
    begin = tl.load(cu_seqlens + segment)
    end = tl.load(cu_seqlens + segment + 1)
    before = tl.load(tile_ends + segment) - tl.cdiv(end - begin, TILE)  # tiles of earlier segments

    rows = begin + (tile - before) * TILE + tl.arange(0, TILE)
    is_row = rows < end
    low = tl.arange(0, LOW)
    high = LOW + tl.arange(0, 16)
    row = key + head * key_head * UNIT + (rows.to(tl.int64) * key_token)[:, None] * UNIT
    key_low = tl.load(row + low[None, :], mask=is_row[:, None], other=0.0)
    if HIGH:
        key_high = tl.load(row + high[None, :], mask=is_row[:, None] & (high < HEAD_DIM)[None, :], other=0.0)

    received = tl.zeros((TILE,), tl.float32)
    for start in range(begin, end, STEP):
        columns = start + tl.arange(0, STEP)
        is_column = columns < end
        column = query + head * query_head * UNIT + (columns.to(tl.int64) * query_token)[:, None] * UNIT
        query_low = tl.load(column + low[None, :], mask=is_column[:, None], other=0.0)
        logits = tl.dot(key_low, tl.trans(query_low), input_precision="ieee")
        if HIGH:
            query_high = tl.load(
                column + high[None, :], mask=is_column[:, None] & (high < HEAD_DIM)[None, :], other=0.0
            )
            logits = tl.dot(key_high, tl.trans(query_high), logits, input_precision="ieee")
        # Past the end of the segment: no query, probability 2^(0 − ∞).
        norm = tl.load(lse + head * tokens + columns, mask=is_column, other=float("inf")) * log2e
        received += tl.sum(tl.exp2(logits * factor - norm[None, :]), 1)
    tl.store(sums + head * tokens + rows, received, mask=is_row)


@no_type_check  # Triton reads annotations, and understands its own alone
def _mean_over_heads(
    sums,  # (heads, n) float32
    scores,  # out: (n,) float32
    heads,
    tokens,
    TILE: tl.constexpr,
):
    """The mean of some tokens' sums, head after head."""
    columns = tl.program_id(0) * TILE + tl.arange(0, TILE)
    is_column = columns < tokens
    total = tl.zeros((TILE,), tl.float32)
    place = sums + columns
    for _ in range(heads):
        total += tl.load(place, mask=is_column, other=0.0)
        place += tokens
    tl.store(scores + columns, total / heads, mask=is_column)
