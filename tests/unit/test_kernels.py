"""The CUDA kernels' scores are those of eager attention: their arithmetic in Triton's interpreter, and what
Triton's compiler makes of them for GPUs that need not be here. On a GPU: tests/gpu/test_kernels_cuda.py."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor

from hiprune.errors import Unsupported
from services.encoder import kernels
from services.encoder.attention import eager_column_sums
from tests import triton_process

HEADS = 2
CPU = torch.device("cpu")

SEEN = {(64, torch.float32), (72, torch.bfloat16), (80, torch.float16), (128, torch.bfloat16)}
"""Each head_dim and each dtype once; `make test-all` runs the other pairs too."""
VARIANTS = [
    pytest.param(
        head_dim,
        dtype,
        marks=[] if (head_dim, dtype) in SEEN else pytest.mark.extra,
        id=f"{head_dim}-{dtype}",
    )
    for head_dim in kernels.HEAD_DIMS
    for dtype in kernels.DTYPES
]

Sums: TypeAlias = Callable[..., Tensor]


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    with triton_process.interpreter() as process:
        yield process


@pytest.fixture
def column_sums(interpreter: ProcessPoolExecutor) -> Sums:
    """`kernels.column_sums`, interpreted."""
    return lambda *args, **kwargs: interpreter.submit(kernels.column_sums, *args, **kwargs).result()


def awkward_lengths(dtype: torch.dtype) -> list[int]:
    """One token, none, and around what a tile and a step of such inputs hold: one less, full, one more."""
    launch = kernels._launch(dtype)
    if launch.tile == launch.step:
        return [1, launch.tile + 1, 0, launch.tile, 2 * launch.tile - 1, 3]
    return [1, launch.tile + 1, 0, launch.tile, launch.step - 1, launch.step, launch.step + 1]


def packed(
    lengths: list[int], head_dim: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """query, key  # (n, heads, d), and cu_seqlens  # (S + 1,)"""
    generator = torch.Generator().manual_seed(sum(lengths) + head_dim)
    query, key = torch.randn(2, sum(lengths), HEADS, head_dim, generator=generator).to(dtype)
    return query, key, torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def reference(query: Tensor, key: Tensor, cu_seqlens: Tensor, scaling: float) -> Tensor:
    """(n,): eager attention of one segment after another."""
    ends = cu_seqlens.tolist()
    return torch.cat(
        [
            eager_column_sums(
                query[None, begin:end].transpose(1, 2), key[None, begin:end].transpose(1, 2), scaling=scaling
            )[0]
            for begin, end in itertools.pairwise(ends)
            if end > begin
        ]
    )


def row_lse(query: Tensor, key: Tensor, cu_seqlens: Tensor, scaling: float) -> Tensor:
    """(heads, n): what flash attention's forward gives."""
    ends = cu_seqlens.tolist()
    parts = []
    for begin, end in itertools.pairwise(ends):
        logits = torch.einsum("qhd,khd->hqk", query[begin:end].float(), key[begin:end].float()) * scaling
        parts.append(logits.logsumexp(-1))
    return torch.cat(parts, dim=1)


# --- arithmetic, interpreted -----------------------------------------------------------------------------


@pytest.mark.parametrize(("head_dim", "dtype"), VARIANTS)
def test_segments_of_any_length_score_as_eager_attention(
    column_sums: Sums, head_dim: int, dtype: torch.dtype
) -> None:
    lengths = awkward_lengths(dtype)
    query, key, cu_seqlens = packed(lengths, head_dim, dtype)
    scaling = 2 * head_dim**-0.5  # attention uneven enough that a misplaced score shows
    scores = column_sums(query, key, cu_seqlens, scaling=scaling, max_seqlen=max(lengths))
    expected = reference(query, key, cu_seqlens, scaling)
    assert expected.std() > 0.25
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=0)
    totals = torch.stack([part.sum() for part in scores.split(lengths)])
    torch.testing.assert_close(totals, torch.tensor(lengths, dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_given_lse_replaces_the_first_pass(column_sums: Sums, dtype: torch.dtype) -> None:
    lengths = [70, 1, 33]
    query, key, cu_seqlens = packed(lengths, 80, dtype)
    lse = row_lse(query, key, cu_seqlens, 0.2)
    scores = column_sums(query, key, cu_seqlens, scaling=0.2, max_seqlen=70, lse=lse)
    torch.testing.assert_close(scores, reference(query, key, cu_seqlens, 0.2), rtol=1e-5, atol=0)
    strided = lse.T.contiguous().T
    assert torch.equal(column_sums(query, key, cu_seqlens, scaling=0.2, max_seqlen=70, lse=strided), scores)
    # it is this lse that counts: larger by log 2, it halves every probability
    halved = column_sums(query, key, cu_seqlens, scaling=0.2, max_seqlen=70, lse=lse + torch.tensor(2).log())
    torch.testing.assert_close(halved, scores / 2)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.extra)], ids=str
)
@pytest.mark.parametrize("has_lse", [False, True], ids=["two-passes", "lse-given"])
def test_a_segment_scores_the_same_bits_alone_and_beside_others(
    column_sums: Sums, dtype: torch.dtype, has_lse: bool
) -> None:
    lengths = [5, 150, 64, 1]
    query, key, cu_seqlens = packed(lengths, 72, dtype)
    lse = row_lse(query, key, cu_seqlens, 0.3) if has_lse else None
    together = column_sums(query, key, cu_seqlens, scaling=0.3, max_seqlen=150, lse=lse)
    for begin, length in zip(cu_seqlens.tolist(), lengths, strict=False):
        own = slice(begin, begin + length)
        alone = column_sums(
            query[own],
            key[own],
            torch.tensor([0, length], dtype=torch.int32),
            scaling=0.3,
            max_seqlen=length,
            lse=None if lse is None else lse[:, own],
        )
        assert torch.equal(together[own], alone)


def test_a_max_seqlen_above_the_longest_segment_changes_no_bit(column_sums: Sums) -> None:
    query, key, cu_seqlens = packed([40, 130], 64, torch.float16)
    exact, generous = (
        column_sums(query, key, cu_seqlens, scaling=0.3, max_seqlen=longest) for longest in (130, 4096)
    )
    assert torch.equal(exact, generous)


def clip_layout(lengths: list[int], head_dim: int) -> tuple[Tensor, Tensor]:
    """A tower's (B, heads, N, d), which is a view of (B, N, heads · d), as packed segments."""
    batch, tokens = len(lengths), lengths[0]
    both = torch.randn(2, batch, tokens, HEADS * head_dim, generator=torch.Generator().manual_seed(0))
    query, key = both.view(2, batch, tokens, HEADS, head_dim).transpose(2, 3)  # (B, heads, N, d)
    return query.transpose(1, 2).flatten(0, 1), key.transpose(1, 2).flatten(0, 1)


def heads_first_layout(lengths: list[int], head_dim: int) -> tuple[Tensor, Tensor]:
    """(heads, n, d) in memory, query and key unlike each other."""
    query, key, _ = packed(lengths, head_dim)
    return query.transpose(0, 1).contiguous().transpose(0, 1), key


def fused_layout(lengths: list[int], head_dim: int) -> tuple[Tensor, Tensor]:
    """Two thirds of one projection, (n, 3, heads, d)."""
    query, key, _ = packed(lengths, head_dim)
    fused = torch.stack((query, key, key), dim=1)
    return fused[:, 0], fused[:, 1]


def unaligned_layout(lengths: list[int], head_dim: int) -> tuple[Tensor, Tensor]:
    """Rows that start and lie apart by no multiple of 16 bytes."""
    query, key, _ = packed(lengths, head_dim)
    wider = torch.zeros(2, sum(lengths), HEADS, head_dim + 3)
    wider[..., 1 : head_dim + 1] = torch.stack((query, key))
    return wider[0, ..., 1 : head_dim + 1], wider[1, ..., 1 : head_dim + 1]


@pytest.mark.parametrize("layout", [clip_layout, heads_first_layout, fused_layout, unaligned_layout])
def test_strides_do_not_matter(column_sums: Sums, layout: Callable[..., tuple[Tensor, Tensor]]) -> None:
    lengths = [45, 45]
    query, key = layout(lengths, 72)
    cu_seqlens = torch.tensor([0, 45, 90], dtype=torch.int32)
    scores = column_sums(query, key, cu_seqlens, scaling=0.2, max_seqlen=45)
    torch.testing.assert_close(scores, reference(query, key, cu_seqlens, 0.2), rtol=1e-5, atol=0)


def test_offsets_pass_two_to_the_31st(column_sums: Sums, interpreter: ProcessPoolExecutor) -> None:
    query, key, cu_seqlens = packed([40], 64, torch.float16)
    far = interpreter.submit(
        triton_process.far_apart, 2**31 + 16, query, key, cu_seqlens, scaling=0.2, max_seqlen=40
    )
    assert torch.equal(far.result(), column_sums(query, key, cu_seqlens, scaling=0.2, max_seqlen=40))


def test_large_logits_stay_finite_and_add_up(column_sums: Sums) -> None:
    lengths = [70, 30]
    query, key, cu_seqlens = packed(lengths, 64)
    scores = column_sums(query * 10, key * 10, cu_seqlens, scaling=0.5, max_seqlen=70)  # logits to ± 1500
    expected = reference(query * 10, key * 10, cu_seqlens, 0.5)
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-3)
    totals = torch.stack([part.sum() for part in scores.split(lengths)])
    torch.testing.assert_close(totals, torch.tensor([70.0, 30.0]), rtol=1e-3, atol=0)


@pytest.mark.parametrize("value", [0.0, 30.0])
def test_equal_keys_receive_equal_attention(column_sums: Sums, value: float) -> None:
    query, _, cu_seqlens = packed([70, 1, 33], 64)
    scores = column_sums(query, torch.full_like(query, value), cu_seqlens, scaling=0.5, max_seqlen=70)
    torch.testing.assert_close(scores, torch.ones_like(scores), rtol=2e-5 * (1 + value), atol=0)


def test_nothing_of_a_neighbour_is_read(column_sums: Sums) -> None:
    query, key, cu_seqlens = packed([70, 65, 33], 80)
    clean = column_sums(query, key, cu_seqlens, scaling=0.2, max_seqlen=70)
    query[70:135], key[70:135] = float("nan"), float("nan")
    beside = column_sums(query, key, cu_seqlens, scaling=0.2, max_seqlen=70)
    assert torch.equal(beside[:70], clean[:70])
    assert torch.equal(beside[135:], clean[135:])
    assert beside[70:135].isnan().all()


def test_tokens_outside_all_segments_score_nothing(column_sums: Sums) -> None:
    query, key, _ = packed([50], 64)
    cu_seqlens = torch.tensor([0, 0, 40], dtype=torch.int32)
    scores = column_sums(query, key, cu_seqlens, scaling=0.2, max_seqlen=40)
    assert scores[:40].sum().item() == pytest.approx(40)
    assert not scores[40:].any()
    assert column_sums(query[:0], key[:0], cu_seqlens[:1], scaling=0.2, max_seqlen=0).shape == (0,)


# --- compiled, for GPUs elsewhere ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., dict[str, Any]]]:
    with triton_process.compiler(tmp_path_factory.mktemp("triton")) as process:
        yield lambda *args: process.submit(triton_process.compiled, *args).result()


def check(found: dict[str, triton_process.Compiled], capability: int, dtype: torch.dtype) -> None:
    assert sorted(found) == ["_column_sum", "_mean_over_heads", "_row_lse"]
    products = "wgmma.mma_async" if capability >= 90 else "mma.sync"
    for name, kernel in found.items():
        assert " atom." not in kernel.ptx
        assert "\tred." not in kernel.ptx
        assert kernel.spilled_bytes == 0
        assert kernel.shared_bytes <= 99 * 1024  # also on consumer cards
        assert "tf32" not in kernel.ptx
        if name != "_mean_over_heads":
            assert (products in kernel.ptx) is (dtype != torch.float32)
            assert "cp.async.cg.shared.global" in kernel.ptx  # copies overlap, whole 16 bytes each


def test_the_kernels_compile_for_hopper_to_its_tensor_cores(compiled: Callable[..., Any]) -> None:
    check(compiled(90, torch.bfloat16, 72), 90, torch.bfloat16)


@pytest.mark.extra
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", kernels.HEAD_DIMS)
def test_every_variant_compiles_without_spills_atomics_or_tf32(
    compiled: Callable[..., Any], capability: int, dtype: torch.dtype, head_dim: int
) -> None:
    check(compiled(capability, dtype, head_dim), capability, dtype)


# --- what is refused, and where there is no Triton -------------------------------------------------------


def test_inputs_that_the_kernels_do_not_take_are_refused() -> None:
    query, key, cu_seqlens = packed([10], 64)

    def scores(query: Tensor, key: Tensor, cu_seqlens: Tensor = cu_seqlens, **options: Any) -> Tensor:
        return kernels.column_sums(query, key, cu_seqlens, scaling=0.1, max_seqlen=10, **options)

    with pytest.raises(Unsupported, match=r"head_dim 48; the kernels take \(64, 72, 80, 128\)"):
        scores(query[..., :48], key[..., :48])
    with pytest.raises(Unsupported, match=r"torch\.float64"):
        scores(query.double(), key.double())
    with pytest.raises(ValueError, match=r"query \(10, 2, 64\).*key \(9, 2, 64\).*one shape"):
        scores(query, key[:9])
    with pytest.raises(ValueError, match="one dtype"):
        scores(query.half(), key)
    with pytest.raises(ValueError, match=r"strides of d are 20 and 1; expected 1"):
        scores(query.permute(2, 0, 1).contiguous().permute(1, 2, 0), key)
    with pytest.raises(ValueError, match=r"cu_seqlens \(2,\) torch.int64; expected"):
        scores(query, key, cu_seqlens.long())
    with pytest.raises(ValueError, match=r"lse \(10, 2\) torch.float32; expected \(2, 10\)"):
        scores(query, key, lse=torch.zeros(10, 2))
    with pytest.raises(ValueError, match="must be on cpu"):
        scores(query, key, cu_seqlens.to("meta"))


def test_a_cpu_is_no_device_for_the_kernels() -> None:
    assert not kernels.supports(64, torch.bfloat16, CPU)
    assert kernels.probe(CPU) == "cpu is no NVIDIA GPU that torch can use"


def test_a_gpu_is_judged_by_its_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not kernels.supports(64, torch.bfloat16, cuda)
    assert kernels.probe(cuda) == "cuda:0 has compute capability (7, 5); the kernels need (8, 0)"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert kernels.supports(64, torch.bfloat16, cuda)
    assert not kernels.supports(96, torch.bfloat16, cuda)
    assert not kernels.supports(64, torch.float64, cuda)


@pytest.fixture
def forgetful() -> Iterator[None]:
    """What a host lacks is found out anew, and forgotten afterwards."""
    kernels._absence.cache_clear()
    yield
    kernels._absence.cache_clear()


@pytest.mark.usefixtures("forgetful")
def test_without_triton_the_module_imports_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)  # import triton raises ImportError
    spec = importlib.util.spec_from_file_location("kernels_anew", kernels.__file__)
    assert spec is not None
    assert spec.loader is not None
    anew = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "kernels_anew", anew)
    spec.loader.exec_module(anew)
    assert not anew.available()
    monkeypatch.setattr(anew, "_refusal", lambda device: None)
    assert anew.probe(CPU).startswith("triton cannot be imported")


@pytest.mark.usefixtures("forgetful")
def test_without_a_c_compiler_the_kernels_are_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.available()
    kernels._absence.cache_clear()
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(kernels, "_refusal", lambda device: None)
    assert not kernels.available()
    assert kernels.probe(CPU) == "triton needs a C compiler at run time: install gcc, or name one in CC"


def test_a_probe_answers_with_whatever_goes_wrong_at_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_refusal", lambda device: None)
    monkeypatch.setattr(kernels, "_absence", lambda: None)

    def fails(*args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("no kernel image\n  for this device")

    monkeypatch.setattr(kernels, "column_sums", fails)
    assert kernels.probe(CPU) == "RuntimeError: no kernel image for this device"
    monkeypatch.setattr(kernels, "column_sums", lambda query, *_, **__: torch.zeros(len(query)))
    assert kernels.probe(CPU) == "the kernels give wrong scores on cpu"
    monkeypatch.setattr(kernels, "column_sums", lambda query, *_, **__: torch.ones(len(query)))
    assert kernels.probe(CPU) is None
