"""Scores captured beside SDPA are those of eager attention, cost no matrix, and disturb nothing."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionAttention

from hiprune.errors import InvalidInput, Unsupported
from services.encoder import segments
from services.encoder.attention import (
    ScoreCapture,
    chunked_column_sums,
    column_sums,
    eager_column_sums,
)

LAYERS = 4
TOKENS = 26  # 5 × 5 patches and CLS


def random_heads(batch: int, heads: int, tokens: int, width: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Query and key, (B, heads, N, d), strided as a tower's projections leave them."""
    both = torch.randn(2, batch, tokens, heads, width, generator=torch.Generator().manual_seed(seed))
    query, key = both.transpose(2, 3)
    return query, key


def clip_tower(attention: str) -> CLIPVisionModel:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        image_size=40,
        patch_size=8,
        initializer_factor=3.0,  # attention uneven enough that a mistake in order shows
        attn_implementation=attention,
    )
    return CLIPVisionModel(config).eval().requires_grad_(False)


def attention_modules(tower: CLIPVisionModel) -> dict[int, Any]:
    return {
        int(name.split(".")[-2]) + 1: module
        for name, module in tower.named_modules()
        if name.endswith(".self_attn")
    }


def images(count: int, *, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 40, 40, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def tower() -> CLIPVisionModel:
    return clip_tower("sdpa")


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The element count of the largest tensor that any operation under it returned."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        self.numel = max(self.numel, *sizes)
        return output


@pytest.mark.parametrize(
    ("batch", "heads", "tokens", "width"),
    [
        (1, 1, 1, 64),
        (4, 8, 1, 80),
        (3, 3, 50, 72),
        (2, 4, 256, 80),
        (1, 16, 577, 64),
        (1, 4, 729, 72),
        (1, 2, 1500, 128),
    ],
)
def test_column_sums_equal_the_eager_reference(batch: int, heads: int, tokens: int, width: int) -> None:
    query, key = random_heads(batch, heads, tokens, width)
    sums = column_sums(query, key, scaling=width**-0.5)
    assert sums.shape == (batch, tokens)
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums, eager_column_sums(query, key, scaling=width**-0.5), rtol=1e-5, atol=0)


@pytest.mark.parametrize("chunk_bytes", [0, 4 * 50, 4 * 50 * 7, 4 * 50 * 50 * 2, 2**30])
def test_scores_do_not_depend_on_the_chunk_size(chunk_bytes: int) -> None:
    query, key = random_heads(2, 3, 50, 64)  # one row, seven rows, two of six heads, everything
    sums = chunked_column_sums(query, key, scaling=0.125, chunk_bytes=chunk_bytes)
    torch.testing.assert_close(sums, eager_column_sums(query, key, scaling=0.125), rtol=1e-5, atol=0)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("chunk_bytes", [4 * 4096, 4 * 4096 * 300, 2**30])
def test_long_sequences_are_scored_tile_by_tile(known: bool, chunk_bytes: int) -> None:
    query, key = random_heads(1, 2, 4099, 8)  # keys beyond one tile; a row, some rows, all rows at a time
    query, key = query[:, :, :610], key * 3
    expected = eager_column_sums(query, key, scaling=0.5)
    log_sums = (query @ key.mT * 0.5).logsumexp(dim=-1) if known else None
    sums = chunked_column_sums(query, key, scaling=0.5, log_sums=log_sums, chunk_bytes=chunk_bytes)
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_segments_attend_as_sdpa_does_and_hand_out_their_row_sums(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    boundaries = packed_rows(PACKED_LENGTHS)[3]
    query, key, value = torch.randn(3, sum(PACKED_LENGTHS), 2, 16).to(dtype).unbind()
    output, log_sums = segments.attend(query, key, value, boundaries, longest=12, scaling=0.3)
    assert log_sums is not None
    for start, stop in itertools.pairwise(boundaries.tolist()):
        one = [tensor[None, start:stop].transpose(1, 2) for tensor in (query, key, value)]
        expected = torch.nn.functional.scaled_dot_product_attention(*one, scale=0.3)  # (1, heads, length, d)
        torch.testing.assert_close(output[None, start:stop].transpose(1, 2), expected)
        logits = one[0].float() @ one[1].float().mT * 0.3
        torch.testing.assert_close(log_sums[:, start:stop], logits[0].logsumexp(dim=-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_scored_in_float32(dtype: torch.dtype) -> None:
    query, key = (each.to(dtype) for each in random_heads(2, 4, 300, 72))
    exact = eager_column_sums(query.double().float(), key.double().float(), scaling=72**-0.5)
    sums = column_sums(query, key, scaling=72**-0.5)
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums, exact, rtol=1e-5, atol=0)


def test_large_logits_stay_finite() -> None:
    query, key = random_heads(1, 2, 64, 64)
    sums = column_sums(query * 1e3, key * 1e3, scaling=1.0)
    torch.testing.assert_close(sums.sum(), torch.tensor(64.0))


def test_scores_of_an_image_add_up_to_its_token_count() -> None:
    query, key = random_heads(3, 4, 577, 64)
    total = column_sums(query, key, scaling=0.125).sum(dim=-1)
    torch.testing.assert_close(total, torch.full((3,), 577.0))


def test_batch_neighbours_do_not_change_scores() -> None:
    query, key = random_heads(5, 4, 197, 64)
    together = column_sums(query, key, scaling=0.125)
    for image in range(5):
        alone = column_sums(query[image : image + 1], key[image : image + 1], scaling=0.125)
        torch.testing.assert_close(together[image : image + 1], alone, rtol=1e-5, atol=0)


def test_no_tensor_of_all_heads_and_query_key_pairs_is_allocated() -> None:
    query, key = random_heads(2, 16, 577, 64)
    with LargestTensor() as seen:  # type: ignore[no-untyped-call]
        column_sums(query, key, scaling=0.125)
    assert seen.numel <= max(4 * 2**20 // 4, query.numel())
    with LargestTensor() as frugal:  # type: ignore[no-untyped-call]
        chunked_column_sums(query, key, scaling=0.125, chunk_bytes=577 * 577)
    assert frugal.numel == query.numel()  # nothing is larger than the inputs


def test_captured_scores_equal_output_attentions_of_an_eager_tower(tower: CLIPVisionModel) -> None:
    pixels = images(3)
    attentions = clip_tower("eager")(pixels, output_attentions=True).attentions  # layers × (B, heads, N, N)
    capture = ScoreCapture(attention_modules(tower))
    with capture.recording(range(1, LAYERS + 1)) as scores:
        tower(pixels)
    assert sorted(scores) == list(range(1, LAYERS + 1))
    for layer, score in scores.items():
        expected = attentions[layer - 1].sum(dim=2).mean(dim=1)
        assert expected.std() > 0.1  # flat attention would pass in any order
        torch.testing.assert_close(score, expected, rtol=1e-5, atol=0)


def test_attention_from_cls_equals_the_first_row_of_an_eager_towers(tower: CLIPVisionModel) -> None:
    pixels = images(3)
    attentions = clip_tower("eager")(pixels, output_attentions=True).attentions  # layers × (B, heads, N, N)
    rows: dict[int, Tensor] = {}
    with ScoreCapture(attention_modules(tower)).recording([2, LAYERS], first_rows=rows) as scores:
        tower(pixels)
    assert sorted(rows) == [2, LAYERS]
    for layer, row in rows.items():
        expected = attentions[layer - 1][:, :, 0].mean(dim=1)
        assert expected.std() > 0.01
        torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-7)
        assert row.argsort().tolist() != scores[layer].argsort().tolist()  # another ranking than from all


def test_only_the_layers_asked_for_are_recorded(tower: CLIPVisionModel) -> None:
    capture = ScoreCapture(attention_modules(tower))
    with capture.recording([3]) as scores:
        tower(images(2))
    assert list(scores) == [3]
    assert scores[3].shape == (2, TOKENS)


def test_nothing_is_recorded_outside_a_recording(
    tower: CLIPVisionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = ScoreCapture(attention_modules(tower))
    with capture.recording([2]) as scores:
        pass
    with monkeypatch.context() as patch:
        patch.delattr("services.encoder.attention.column_sums")  # would raise where it is called
        tower(images(1))
        with capture.recording([]) as none:
            tower(images(1))
    assert scores == none == {}


def test_a_failed_forward_ends_its_recording(tower: CLIPVisionModel) -> None:
    capture = ScoreCapture(attention_modules(tower))
    with pytest.raises(ValueError), capture.recording([1]) as scores:
        tower(torch.zeros(1, 3, 7, 7))
    tower(images(1))
    assert scores == {}


def test_outputs_are_bit_identical_with_and_without_recording(tower: CLIPVisionModel) -> None:
    pixels = images(2)
    before = tower(pixels, output_hidden_states=True).hidden_states
    capture = ScoreCapture({layer: attention_modules(tower)[layer] for layer in (2, LAYERS)})
    marked = tower(pixels, output_hidden_states=True).hidden_states
    with capture.recording([2, LAYERS]) as scores:
        recorded = tower(pixels, output_hidden_states=True).hidden_states
    assert len(scores) == 2
    for plain, silent, loud in zip(before, marked, recorded, strict=True):
        assert torch.equal(plain, silent)
        assert torch.equal(plain, loud)


def test_modules_that_are_not_marked_keep_the_shared_config(tower: CLIPVisionModel) -> None:
    modules = attention_modules(tower)
    shared = modules[1].config
    ScoreCapture({2: modules[2]})
    assert modules[1].config is modules[3].config is shared is tower.config
    assert tower.config._attn_implementation == "sdpa"
    assert modules[2].config is not shared


def test_threads_that_record_at_once_do_not_mix(tower: CLIPVisionModel) -> None:
    capture = ScoreCapture(attention_modules(tower))
    asked = {0: [1, 3], 1: [2, 3]}
    pixels = {0: images(1, seed=10), 1: images(2, seed=20)}

    def score(who: int) -> dict[int, Tensor]:
        with capture.recording(asked[who]) as scores:
            tower(pixels[who])
        return scores

    alone = {who: score(who) for who in asked}
    meeting = threading.Barrier(2, timeout=10)

    def meet(*_: object) -> None:
        meeting.wait()

    for module in attention_modules(tower).values():
        module.register_forward_pre_hook(meet)  # both threads enter every layer at the same time
    with ThreadPoolExecutor(2) as pool:
        together = dict(zip(asked, pool.map(score, asked), strict=True))

    for who, layers in asked.items():
        assert sorted(together[who]) == layers
        for layer in layers:
            torch.testing.assert_close(together[who][layer], alone[who][layer])


def packed_attention() -> tuple[Qwen2_5_VLVisionAttention, ScoreCapture]:
    torch.manual_seed(0)
    config = Qwen2_5_VLVisionConfig(hidden_size=64, num_heads=2, attn_implementation="sdpa")
    module = Qwen2_5_VLVisionAttention(config).requires_grad_(False)
    return module, ScoreCapture({7: module}, packed=True)


PACKED_LENGTHS = [8, 8, 8, 4, 12, 12, 1, 8]


def packed_rows(lengths: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    total = sum(lengths)
    angles = torch.randn(total, 32)
    boundaries = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return torch.randn(total, 64), angles.cos(), angles.sin(), boundaries


def test_segments_of_a_packed_sequence_attend_and_score_each_for_itself() -> None:
    module, capture = packed_attention()
    hidden, cosine, sine, boundaries = packed_rows(PACKED_LENGTHS)

    def run(start: int, stop: int, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        rotary = (cosine[start:stop], sine[start:stop])
        with capture.recording([7]) as scores:
            output = module(hidden[start:stop], cu_seqlens, position_embeddings=rotary)
        return output, scores[7]

    output, scores = run(0, len(hidden), boundaries)
    assert scores.shape == (1, len(hidden))
    for start, stop in itertools.pairwise(boundaries.tolist()):
        alone, own = run(start, stop, torch.tensor([0, stop - start], dtype=torch.int32))
        torch.testing.assert_close(output[start:stop], alone)
        torch.testing.assert_close(scores[:, start:stop], own)
        torch.testing.assert_close(own.sum(), torch.tensor(float(stop - start)))


def test_packed_attention_equals_the_stock_module() -> None:
    module, _ = packed_attention()
    hidden, cosine, sine, boundaries = packed_rows(PACKED_LENGTHS)
    ours = module(hidden, boundaries, position_embeddings=(cosine, sine))
    module.config._attn_implementation_internal = "sdpa"
    stock = module(hidden, boundaries, position_embeddings=(cosine, sine))
    torch.testing.assert_close(ours, stock)


def test_neighbouring_segments_of_one_length_make_one_run() -> None:
    boundaries = packed_rows(PACKED_LENGTHS)[3]
    assert list(segments.runs(boundaries)) == [(0, 3, 8), (24, 1, 4), (28, 2, 12), (52, 1, 1), (53, 1, 8)]


def test_a_layer_that_was_not_marked_is_refused_by_name(tower: CLIPVisionModel) -> None:
    capture = ScoreCapture({2: attention_modules(tower)[2]})
    with pytest.raises(InvalidInput, match=r"layer 3.*available: \[2\]") as caught, capture.recording([2, 3]):
        pass
    assert caught.value.field == "layers"


def test_masked_attention_is_refused_while_recording(tower: CLIPVisionModel) -> None:
    module = attention_modules(tower)[1]
    capture = ScoreCapture({1: module})
    hidden, mask = torch.randn(1, 5, 32), torch.zeros(1, 1, 5, 5)
    module(hidden, attention_mask=mask)
    with pytest.raises(Unsupported), capture.recording([1]):
        module(hidden, attention_mask=mask)
