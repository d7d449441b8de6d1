"""The kernels on a CUDA device, at the sizes that towers have; their arithmetic in small: test_kernels.py."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.varlen import AuxRequest, varlen_attn

from services.encoder import kernels
from services.encoder.attention import eager_column_sums
from services.encoder.kernels import column_sums

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
HALVES = (torch.bfloat16, torch.float16)
RTOL = {torch.float32: 1e-5, torch.bfloat16: 1e-4, torch.float16: 1e-4}


@pytest.fixture(autouse=True)
def exact_reference() -> Iterator[None]:
    """No TF32 in the products that the kernels are compared with."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def packed(
    lengths: list[int], heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """query, key  # (n, heads, d), and cu_seqlens  # (S + 1,)"""
    generator = torch.Generator(CUDA).manual_seed(sum(lengths) + head_dim)
    shape = (sum(lengths), heads, head_dim)
    query, key = (torch.randn(shape, generator=generator, device=CUDA).to(dtype) for _ in range(2))
    return query, key, torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(CUDA)


def reference(query: Tensor, key: Tensor, cu_seqlens: Tensor, scaling: float) -> Tensor:
    """(n,): eager attention of one segment after another."""
    return torch.cat(
        [
            eager_column_sums(
                query[None, begin:end].transpose(1, 2), key[None, begin:end].transpose(1, 2), scaling=scaling
            )[0]
            for begin, end in itertools.pairwise(cu_seqlens.tolist())
            if end > begin
        ]
    )


def long_reference(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """(n,) of one segment whose probabilities no memory holds: 512 queries at a time, summed in float64."""
    keys = key.transpose(0, 1).float().mT  # (heads, d, n)
    sums = torch.zeros(len(key), dtype=torch.float64, device=key.device)
    for some in query.split(512):  # (≤512, heads, d)
        attention = (some.transpose(0, 1).float() @ keys * scaling).softmax(dim=-1)  # (heads, ≤512, n)
        sums += attention.sum(dim=(0, 1), dtype=torch.float64)
    return (sums / key.shape[1]).float()


@pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", kernels.HEAD_DIMS)
def test_images_of_many_sizes_score_as_eager_attention(head_dim: int, dtype: torch.dtype) -> None:
    lengths = [577, 1, 4096, 127, 128, 129, 0, 729, 64, 63, 33]
    query, key, cu_seqlens = packed(lengths, 4, head_dim, dtype)
    scaling = 2 * head_dim**-0.5
    scores = column_sums(query, key, cu_seqlens, scaling=scaling, max_seqlen=4096)
    expected = reference(query, key, cu_seqlens, scaling)
    assert expected.std() > 0.1
    torch.testing.assert_close(scores, expected, rtol=RTOL[dtype], atol=0)
    totals = torch.stack([part.sum() for part in scores.split(lengths)]).cpu()
    torch.testing.assert_close(totals, torch.tensor(lengths, dtype=torch.float32), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_long_video_beside_many_windows(dtype: torch.dtype) -> None:
    windows, length = 500, 65536
    query, key, cu_seqlens = packed([64] * windows + [length], 2, 80, dtype)
    scores = column_sums(query, key, cu_seqlens, scaling=0.2, max_seqlen=length)
    small = windows * 64
    batch = [tensor[:small].view(windows, 64, 2, 80).transpose(1, 2) for tensor in (query, key)]
    expected = eager_column_sums(*batch, scaling=0.2).flatten()
    torch.testing.assert_close(scores[:small], expected, rtol=RTOL[dtype], atol=0)
    expected = long_reference(query[small:], key[small:], 0.2)
    torch.testing.assert_close(scores[small:], expected, rtol=2 * RTOL[dtype], atol=0)


def flash_lse(query: Tensor, key: Tensor, cu_seqlens: Tensor, scaling: float, longest: int) -> Tensor:
    """(heads, n) from torch's own flash attention over segments."""
    options: dict[str, Any] = {"scale": scaling, "return_aux": AuxRequest(lse=True)}
    if "num_splits" in inspect.signature(varlen_attn).parameters:
        options["num_splits"] = 1  # else the longest neighbour may change a segment's bits
    _, lse = varlen_attn(query, key, key, cu_seqlens, cu_seqlens, longest, longest, **options)
    return lse


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("head_dim", kernels.HEAD_DIMS)
def test_the_lse_of_packed_flash_attention_serves(head_dim: int, dtype: torch.dtype) -> None:
    lengths = [577, 1, 4096, 128, 64, 33]
    query, key, cu_seqlens = packed(lengths, 4, head_dim, dtype)
    scaling = head_dim**-0.5
    lse = flash_lse(query, key, cu_seqlens, scaling, 4096)
    assert lse.shape == (4, sum(lengths))  # not (n, heads), as its documentation says
    scores = column_sums(query, key, cu_seqlens, scaling=scaling, max_seqlen=4096, lse=lse)
    torch.testing.assert_close(scores, reference(query, key, cu_seqlens, scaling), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_lse_of_batched_flash_attention_serves(dtype: torch.dtype) -> None:
    generator = torch.Generator(CUDA).manual_seed(0)
    projected = torch.randn(3, 5, 577, 16 * 64, generator=generator, device=CUDA).to(dtype)
    query, key, value = projected.view(3, 5, 577, 16, 64).transpose(2, 3)  # (B, heads, N, d) each, as CLIP's
    lse = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=0.125)[1]
    assert lse.shape == (5, 16, 577)
    scores = column_sums(
        query.transpose(1, 2).flatten(0, 1),
        key.transpose(1, 2).flatten(0, 1),
        torch.arange(0, 6 * 577, 577, dtype=torch.int32, device=CUDA),
        scaling=0.125,
        max_seqlen=577,
        lse=lse.transpose(0, 1).flatten(1),  # (heads, B · N)
    )
    expected = eager_column_sums(query, key, scaling=0.125).flatten()
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)
@pytest.mark.parametrize("has_lse", [False, True], ids=["two-passes", "lse-given"])
def test_a_segment_scores_the_same_bits_alone_and_beside_others(dtype: torch.dtype, has_lse: bool) -> None:
    lengths = [577, 1, 2050, 64, 129]
    query, key, cu_seqlens = packed(lengths, 16, 72, dtype)
    lse = torch.randn(16, sum(lengths), device=CUDA) + 7 if has_lse else None
    together = column_sums(query, key, cu_seqlens, scaling=0.2, max_seqlen=2050, lse=lse)
    again = column_sums(query, key, cu_seqlens, scaling=0.2, max_seqlen=2050, lse=lse)
    assert torch.equal(together, again)
    for begin, length in zip(cu_seqlens.tolist(), lengths, strict=False):
        own = slice(begin, begin + length)
        alone = column_sums(
            query[own],
            key[own],
            torch.tensor([0, length], dtype=torch.int32, device=CUDA),
            scaling=0.2,
            max_seqlen=length,
            lse=None if lse is None else lse[:, own],
        )
        assert torch.equal(together[own], alone)


@pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)
def test_strides_and_alignment_do_not_matter(dtype: torch.dtype) -> None:
    query, key, cu_seqlens = packed([577, 100], 4, 72, dtype)
    expected = reference(query, key, cu_seqlens, 0.2)
    fused = torch.stack((query, key, key), dim=1)  # (n, 3, heads, d)
    heads_first = query.transpose(0, 1).contiguous().transpose(0, 1)
    odd_strides = torch.zeros(677, 4, 75, dtype=dtype, device=CUDA)[..., :72].copy_(key)
    odd_start = torch.zeros(677 * 4 * 72 + 1, dtype=dtype, device=CUDA)[1:].view(677, 4, 72).copy_(key)
    for queries, keys in (
        (fused[:, 0], fused[:, 1]),
        (heads_first, key),
        (query, odd_strides),
        (query, odd_start),
    ):
        scores = column_sums(queries, keys, cu_seqlens, scaling=0.2, max_seqlen=577)
        torch.testing.assert_close(scores, expected, rtol=RTOL[dtype], atol=0)


def test_offsets_pass_two_to_the_31st() -> None:
    query, key, cu_seqlens = packed([300, 100], 2, 64, torch.bfloat16)
    distance = 2**31 + 16  # 4 GB between two heads
    spread = torch.empty(distance + 400 * 64, dtype=key.dtype, device=CUDA).as_strided(
        key.shape, (64, distance, 1)
    )
    spread.copy_(key)
    far, close = (column_sums(query, keys, cu_seqlens, scaling=0.2, max_seqlen=300) for keys in (spread, key))
    assert torch.equal(far, close)


@pytest.mark.parametrize("tokens", [16384, 65536])
def test_memory_grows_with_tokens_and_not_with_their_square(tokens: int) -> None:
    heads = 16
    query, key, cu_seqlens = packed([tokens], heads, 80, torch.bfloat16)
    column_sums(query, key, cu_seqlens, scaling=0.1, max_seqlen=tokens)  # what a first launch allocates
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    column_sums(query, key, cu_seqlens, scaling=0.1, max_seqlen=tokens)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= 2.2 * heads * tokens * 4 + 4 * 2**20  # the log-sum-exp, the sums, the scores, the tables


def test_nothing_of_a_neighbour_is_read() -> None:
    query, key, cu_seqlens = packed([577, 65, 300], 4, 72, torch.bfloat16)
    clean = column_sums(query, key, cu_seqlens, scaling=0.2, max_seqlen=577)
    query[577:642], key[577:642] = float("nan"), float("nan")
    beside = column_sums(query, key, cu_seqlens, scaling=0.2, max_seqlen=577)
    assert torch.equal(beside[:577], clean[:577])
    assert torch.equal(beside[642:], clean[642:])


@pytest.mark.parametrize("factor", [1.0, 30.0])
def test_large_and_equal_logits_stay_finite(factor: float) -> None:
    query, key, cu_seqlens = packed([577, 64], 4, 64, torch.bfloat16)
    totals = torch.tensor([577.0, 64.0])
    scores = column_sums(query * factor, key * factor, cu_seqlens, scaling=0.5, max_seqlen=577)
    torch.testing.assert_close(
        torch.stack([part.sum() for part in scores.split([577, 64])]).cpu(),
        totals,
        rtol=1e-5 * (1 + factor**2),
        atol=0,
    )
    equal = column_sums(query, torch.full_like(key, factor), cu_seqlens, scaling=0.5, max_seqlen=577)
    torch.testing.assert_close(equal, torch.ones_like(equal), rtol=1e-4 * (1 + factor), atol=0)


def test_a_cuda_graph_records_the_kernels() -> None:
    query, key, cu_seqlens = packed([577, 577], 16, 64, torch.bfloat16)
    options: dict[str, Any] = {"scaling": 0.2, "max_seqlen": 577}
    column_sums(query, key, cu_seqlens, **options)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = column_sums(query, key, cu_seqlens, **options)
    key.copy_(key.flip(0))
    graph.replay()
    assert torch.equal(recorded, column_sums(query, key, cu_seqlens, **options))


@pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", kernels.HEAD_DIMS)
def test_a_probe_finds_nothing_wrong(head_dim: int, dtype: torch.dtype) -> None:
    assert kernels.available()
    assert kernels.supports(head_dim, dtype, CUDA)
    assert kernels.probe(CUDA, head_dim=head_dim, dtype=dtype) is None
