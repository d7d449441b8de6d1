"""Claims about what models cost: against torch's own counter, the models' own weights, and the paper."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import (
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLVisionConfig,
)
from typer.testing import CliRunner

from hiprune.budgets import Budget
from hiprune.checkpoints import open_checkpoint
from hiprune.cli import app
from hiprune.config import EMBEDDED_MODEL
from hiprune.costs import Media, Model, TextShape, decode_flops, prefill_flops
from hiprune.costs.media import resized, seen
from hiprune.costs.published import CLIP_L_336, CONFIGS
from hiprune.costs.shapes import TextEncoderShape, TowerShape, divprune_pairs, filled
from hiprune.errors import InvalidInput
from hiprune.families import facts_of, families
from services.encoder.families import load_tower
from services.pruner.methods import divprune
from services.pruner.text import PairedTextEncoder
from tests.tiny import make_llava
from tests.tiny_anyres import make_clip, make_llava_next, make_llava_onevision
from tests.tiny_qwen import make_qwen2_5_vl
from tests.tiny_video_llava import make_video_llava

SIZES = {"vocab_size": 200, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3}
HALF = Budget(keep_ratio=0.5)


def counted(work: Callable[[], object]) -> float:
    """Operations that torch counts, attention's fused CPU kernel, which it has no formula for, among them."""

    def attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
        batch, heads, queries, width = query
        return 2 * batch * heads * queries * key[-2] * (width + value[-1])

    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={fused: attention})
    with torch.no_grad(), counter:
        work()
    return float(counter.get_total_flops())


# --- the language model -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (LlamaForCausalLM, LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=4)),
        (LlamaForCausalLM, LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2)),
        (LlamaForCausalLM, LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=1, head_dim=32)),
        (Qwen2ForCausalLM, Qwen2Config(**SIZES, num_attention_heads=4, num_key_value_heads=2)),
    ],
    ids=["multi-head", "grouped", "multi-query, wide heads", "qwen2"],
)
@pytest.mark.parametrize("tokens", [1, 17, 256])
def test_a_prefill_and_a_token_behind_it_are_within_a_hundredth_of_what_torch_counts(
    model_class, config, tokens
):
    config._attn_implementation = "eager"  # torch counts its matrix products
    model = model_class(config).eval()
    shape = TextShape.of(config.to_dict())
    kept: list[Any] = []
    ids = torch.zeros((1, tokens), dtype=torch.long)
    found = counted(lambda: kept.append(model(ids, logits_to_keep=1, use_cache=True)))
    assert prefill_flops(shape, tokens) == pytest.approx(found, rel=0.01)
    cache = kept[0].past_key_values
    held = sum(each.keys.nbytes + each.values.nbytes for each in cache.layers)
    assert shape.kv_bytes(tokens, number_bytes=4) == held
    step = counted(lambda: model(ids[:, :1], past_key_values=cache, use_cache=True))
    assert decode_flops(shape, tokens + 1) == pytest.approx(step, rel=0.01)
    assert shape.parameters == sum(each.numel() for each in model.parameters())


# --- every family -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiny:
    """A small checkpoint of one family, and what it is shown."""

    path: Path
    tower: Any
    model: Model
    media: tuple[Media, ...]
    paired: Path | None = None


MAKERS = {
    "llava": make_llava,
    "llava_next": make_llava_next,
    "llava_onevision": make_llava_onevision,
    "qwen2_5_vl": make_qwen2_5_vl,
    "video_llava": make_video_llava,
}
SHOWN = {
    "llava": (Media(64, 64),),
    "llava_next": (Media(30, 90), Media(64, 64), Media(50, 41)),
    "llava_onevision": (Media(30, 90), Media(200, 64)),
    "qwen2_5_vl": (Media(64, 64), Media(70, 130), Media(48, 80, frames=5)),
    "video_llava": (Media(64, 64), Media(64, 64, frames=8)),
}


@pytest.fixture(scope="module", params=sorted(MAKERS))
def tiny(request, tmp_path_factory) -> Iterator[Tiny]:
    folder = tmp_path_factory.mktemp(request.param)
    path = MAKERS[request.param](folder / "model")
    checkpoint = open_checkpoint(str(path))
    paired = make_clip(folder / "clip") if request.param == "llava_next" else None
    tower = load_tower(checkpoint, paired, torch.device("cpu"), torch.float32)
    clip = json.loads((paired / "config.json").read_text("utf-8")) if paired else None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Tiny(path, tower, Model.of(checkpoint.config, paired=clip), SHOWN[request.param], paired)
    torch.set_num_threads(threads)


def test_every_family_is_counted_here():
    assert sorted(MAKERS) == families()


def prepared(tiny: Tiny, media: Media) -> Any:
    image = Image.effect_noise((media.width, media.height), 60).convert("RGB")
    if media.frames is None:
        return tiny.tower.prepare(image)
    return tiny.tower.prepare_video([image] * media.frames, 2.0)


def encoding(tiny: Tiny, media: Media, layers: set[int], *, aligned: bool = False) -> float:
    """Operations of the tower itself over one media item."""
    item = prepared(tiny, media)
    return counted(lambda: tiny.tower.encode([item], layers, [aligned]))


def test_a_tower_knows_what_media_cost_before_it_has_their_pixels(tiny: Tiny):
    for media in tiny.media:
        item = prepared(tiny, media)
        assert tiny.tower.patches((media.width, media.height), media.frames) == item.patches
        views = tiny.tower.encode([item], set(), [False])[0]
        # what the tower leaves: a merged token for four patches, tokens beside the grid
        rows = sum(len(view.features) + len(view.prefix if view.prefix is not None else ()) for view in views)
        assert item.patches == rows * (4 if tiny.model.facts.family == "qwen2_5_vl" else 1)


def costs_of(tiny: Tiny, media: Media, **options: Any) -> Any:
    # as the tiny processors' bounds: 4 to 64 tokens of 16 × 16 pixels
    return tiny.model.costs(media, HALF, pixel_bounds=(4 * 256, 64 * 256), **options)


def test_tower_and_capture_are_within_a_hundredth_of_what_torch_counts(tiny: Tiny):
    facts = tiny.model.facts
    for media in tiny.media:
        costs = costs_of(tiny, media)
        plain = encoding(tiny, media, set())
        assert costs.before.vision == costs.after.vision == pytest.approx(plain, rel=0.01), media
        with_scores = encoding(tiny, media, {facts.object_layer, facts.deep_layer})
        assert costs.after.capture == pytest.approx(with_scores - plain, rel=0.01), media
        one = encoding(tiny, media, {facts.deep_layer})
        zipped = costs_of(tiny, media, method="visionzip").after.capture
        assert zipped == pytest.approx(one - plain, rel=0.01), media
        assert costs.before.capture == 0


def test_tokens_in_the_questions_space_are_within_a_hundredth_of_what_torch_counts(tiny: Tiny):
    if tiny.model.facts.compares != "aligned" or tiny.model.facts.family == "llava":
        assert costs_of(tiny, tiny.media[0], method="hiprune++").after.align == 0
        return
    for media in tiny.media:
        found = encoding(tiny, media, set(), aligned=True) - encoding(tiny, media, set())
        assert costs_of(tiny, media, method="hiprune++").after.align == pytest.approx(found, rel=0.01)


def test_projector_and_weights_are_the_stock_models(tiny: Tiny):
    stock = AutoModelForImageTextToText.from_pretrained(tiny.path, dtype=torch.float32).eval()
    projector = getattr(stock.model, "multi_modal_projector", None)
    newline = getattr(stock.model, "image_newline", None)
    size = 0 if newline is None else newline.numel()
    if projector is not None:
        size += sum(each.numel() for each in projector.parameters())
        rows = torch.zeros(1, 13, tiny.model.facts.hidden_size)
        found = counted(lambda: projector(rows))
        assert tiny.model.projector.flops(13) == pytest.approx(found, rel=0.01)
    assert tiny.model.projector.parameters == size
    text = stock.model.language_model
    head = 0 if tiny.model.text.tied else stock.lm_head.weight.numel()
    assert tiny.model.text.parameters == head + sum(each.numel() for each in text.parameters())
    towers = [
        each for name, each in vars(tiny.tower).items() if name in {"model", "image_tower", "video_tower"}
    ]
    loaded = sum(each.numel() for tower in towers for each in tower.parameters())
    assert tiny.model.towers * tiny.model.tower.parameters == loaded


def test_views_and_tokens_are_those_of_the_tower(tiny: Tiny):
    for media in tiny.media:
        shown = seen(tiny.model.config, tiny.model.facts, media, pixel_bounds=(4 * 256, 64 * 256))
        (views,) = tiny.tower.encode([prepared(tiny, media)], set(), [False])
        assert [view.grid for view in views] == list(shown.grids), media
        valid = [view.valid[2] * view.valid[3] if view.valid else len(view.features) for view in views]
        assert valid == list(shown.valid), media
        assert {0 if view.prefix is None else len(view.prefix) for view in views} == {shown.prefix}


def test_costs_follow_the_tokens_that_are_kept(tiny: Tiny):
    for media in tiny.media:
        found = costs_of(tiny, media, text_tokens=9, batch=3)
        shape, kept = tiny.model.text, found.after.visual_tokens
        assert kept <= found.before.visual_tokens / 2 + len(tiny.media)
        assert found.after.prompt_tokens == kept + 9
        assert found.after.prefill == 3 * prefill_flops(shape, kept + 9)
        assert found.after.kv_bytes == 3 * shape.kv_bytes(kept + 9)
        assert found.after.first_token < found.before.first_token + found.after.capture
        whole = tiny.model.costs(media, Budget(), pixel_bounds=(4 * 256, 64 * 256), text_tokens=9)
        assert whole.after.prefill == whole.before.prefill


def test_whole_tiles_make_as_many_rows_as_stock_packs():
    for name in ("llava-next-7b", "llava-onevision-0.5b"):
        config = CONFIG_MAPPING[CONFIGS[name]["model_type"]].from_dict(dict(CONFIGS[name]))
        model = Model.of(CONFIGS[name])
        for height, width in ((672, 672), (300, 1000), (1000, 301), (2000, 3000), (60, 40)):
            shown = seen(model.config, model.facts, Media(height, width))
            assert shown.whole_rows == stock_rows(name, config, height, width), (name, height, width)


def stock_rows(name: str, config: Any, height: int, width: int) -> int:
    """What transformers' own processors say that an image becomes."""
    from transformers import LlavaNextProcessor, LlavaOnevisionProcessor
    from transformers.image_processing_utils import select_best_resolution

    side = config.vision_config.image_size // config.vision_config.patch_size
    canvas = select_best_resolution((height, width), config.image_grid_pinpoints)
    tiles = [extent // config.vision_config.image_size for extent in canvas]
    kind = LlavaNextProcessor if "next" in name else LlavaOnevisionProcessor
    processor = kind.__new__(kind)
    processor.vision_aspect_ratio = "anyres_max_9"
    unpadded, newlines = processor._get_unpadded_features(height, width, side, side, *tiles)
    return side * side + unpadded + newlines


@pytest.mark.parametrize("bounds", [(3136, 12_845_056), (4 * 784, 16 * 784)])
@pytest.mark.parametrize("size", [(28, 28), (1, 150), (672, 671), (1080, 1920), (5000, 9000), (13, 999)])
def test_qwens_sizes_are_those_of_stock(size, bounds):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    ours = resized(*size, 28, bounds)
    assert ours == tuple(smart_resize(*size, factor=28, min_pixels=bounds[0], max_pixels=bounds[1]))


def test_a_text_encoder_is_within_a_hundredth_of_what_torch_counts(tmp_path):
    path = make_clip(tmp_path / "clip")
    encoder = PairedTextEncoder(path)
    shape = TextEncoderShape.of(json.loads((path / "config.json").read_text("utf-8")), vision_size=48)
    for words in ("circle", "which colour is the circle ?", "red " * 200):
        chunks = encoder.split(words)
        found = counted(lambda chunks=chunks: encoder.embed(chunks))
        assert shape.flops(sum(map(len, chunks))) == pytest.approx(found, rel=0.01)


# --- published sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_a_published_model_has_the_weights_of_transformers_own_at_full_size(name):
    config = CONFIG_MAPPING[CONFIGS[name]["model_type"]].from_dict(json.loads(json.dumps(CONFIGS[name])))
    with torch.device("meta"):
        stock = AutoModelForImageTextToText.from_config(config)
    model = Model.of(CONFIGS[name])
    text = sum(each.numel() for each in stock.model.language_model.parameters())
    assert model.text.parameters == text + (0 if model.text.tied else stock.lm_head.weight.numel())
    assert model.text.tied == config.tie_word_embeddings


def test_llava_at_its_full_size_is_within_a_hundredth_of_what_torch_counts_without_a_weight():
    model = Model.of(CONFIGS["llava-1.5-7b"])
    config = AutoConfig.for_model(**json.loads(json.dumps(CONFIGS["llava-1.5-7b"])))
    config.vision_config.num_hidden_layers = model.facts.deep_layer
    config._attn_implementation = "eager"
    for part in (config.vision_config, config.text_config):
        part._attn_implementation = "eager"
    with torch.device("meta"):
        stock = AutoModelForImageTextToText.from_config(config)
        pixels = torch.zeros(1, 3, 336, 336)
        ids = torch.zeros((1, 192 + 77), dtype=torch.long)
    tower = stock.model.vision_tower
    costs = model.costs(Media(), Budget(keep_count=192))
    assert costs.after.vision == pytest.approx(counted(lambda: tower(pixels)), rel=0.01)
    head = counted(lambda: stock.lm_head(torch.zeros(1, 1, 4096, device="meta")))
    rest = counted(lambda: stock.model.language_model(input_ids=ids))
    assert costs.after.prefill == pytest.approx(rest + head, rel=0.01)
    assert model.tower.parameters == sum(each.numel() for each in tower.parameters())


PAPERS = {576: 8.63, 192: 3.56, 128: 2.71, 64: 1.87}
"""TFLOPs of LLaVA-1.5-7B by visual tokens: HiPrune, table of efficiency."""


@pytest.mark.parametrize("visual", PAPERS)
def test_the_papers_figures_come_out_within_three_hundredths(visual):
    model = Model.of(CONFIGS["llava-1.5-7b"])
    run = model.costs(Media(), Budget(keep_count=visual)).after
    assert run.visual_tokens == visual
    assert run.prefill / 1e12 == pytest.approx(PAPERS[visual], rel=0.03)


@pytest.mark.parametrize("visual", PAPERS)
def test_the_papers_own_count_is_of_matrices_alone_with_logits_of_every_token(visual):
    shape = Model.of(CONFIGS["llava-1.5-7b"]).text
    found = 2 * (visual + 77) * (shape.linear_macs + shape.head_macs) / 1e12
    assert found == pytest.approx(PAPERS[visual], rel=0.004)


def test_what_a_config_leaves_unsaid_is_what_transformers_takes():
    kinds = {
        **{"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config},
        **{"clip_vision_model": CLIPVisionConfig, "siglip_vision_model": SiglipVisionConfig},
        **{"clip_text_model": CLIPTextConfig, "qwen2_5_vl_text": Qwen2_5_VLTextConfig},
        "qwen2_5_vl_vision": Qwen2_5_VLVisionConfig,
    }
    for kind, config_class in kinds.items():
        theirs = config_class().to_dict()
        ours = dict(filled({}, kind))
        del ours["model_type"]
        assert ours
        assert {key: tuple(v) if isinstance(v := theirs[key], list) else v for key in ours} == ours, kind


def test_the_published_text_encoder_has_the_weights_of_transformers_own():
    shape = TextEncoderShape.of(CLIP_L_336, vision_size=1024)
    with torch.device("meta"):
        text = CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_L_336["text_config"], projection_dim=768))
    aligned = 1024 * 768 + 2 * 1024  # the tokens' projection and the norm before it
    assert shape.parameters == sum(each.numel() for each in text.parameters()) + aligned


def test_the_embedded_models_config_has_a_shape():
    shape = TextShape.of(AutoConfig.from_pretrained(EMBEDDED_MODEL).text_config.to_dict())
    assert prefill_flops(shape, 200) > prefill_flops(shape, 100) > 0


# --- the command ------------------------------------------------------------------------------------------


def test_the_command_prints_the_same_as_a_table_and_as_json():
    shown = CliRunner().invoke(app, ["flops", "--keep", "192"], env={"COLUMNS": "100"})
    assert (shown.exit_code, "prefill, TFLOPs" in shown.stdout) == (0, True), shown.output
    found = json.loads(CliRunner().invoke(app, ["flops", "--keep", "192", "--json"]).stdout)
    expected = Model.of(CONFIGS["llava-1.5-7b"]).costs(Media(), Budget(keep_count=192))
    assert found["after"]["prefill"] == expected.after.prefill
    assert f"{found['after']['prefill'] / 1e12:.3g}" in shown.stdout
    assert found["weights_bytes"] == expected.weights_bytes


def test_the_command_reads_a_directory_and_the_clip_beside_it():
    arguments = ["flops", "--model", str(EMBEDDED_MODEL), "--method", "hiprune++", "--json"]
    found = json.loads(CliRunner().invoke(app, arguments).stdout)
    config = json.loads((EMBEDDED_MODEL / "config.json").read_text("utf-8"))
    clip = json.loads((EMBEDDED_MODEL.parent / "clip" / "config.json").read_text("utf-8"))
    expected = Model.of(config, paired=clip).costs(Media(), Budget(keep_ratio=1 / 3), method="hiprune++")
    assert found["after"]["text"] == expected.after.text > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "llava-2"], "llava-1.5-7b"),
        (["--keep", "0"], "at least 1"),
        (["--keep", "a third"], "33%"),
        (["--keep", "1.5"], "(0, 1]"),
        (["--image", "large"], "WxH"),
        (["--image", "0x10"], "1x1"),
        (["--frames", "3"], "video"),
        (["--method", "none"], "hiprune"),
        (["--dtype", "f8"], "bf16"),
        (["--model", "qwen2.5-vl-3b", "--image", "1x999"], "200"),
    ],
)
def test_the_command_says_what_it_expected(arguments, said):
    result = CliRunner().invoke(app, ["flops", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert said in result.output


@pytest.mark.parametrize("tokens", [64, divprune.TABLE_TOKENS, divprune.TABLE_TOKENS + 1])
def test_divprune_is_counted_as_it_runs_with_and_without_a_table(tokens, monkeypatch):
    run, computed = divprune._distances, []

    def distances(some: Any, others: Any) -> Any:
        computed.append(len(some) * len(others))
        return run(some, others)

    monkeypatch.setattr(divprune, "_distances", distances)
    features = np.random.default_rng(0).normal(size=(tokens, 2))
    divprune.divprune(features, keep=tokens // 2)
    assert divprune_pairs(tokens, tokens // 2) == sum(computed)
    assert divprune_pairs(tokens, tokens) == 0


def test_an_image_of_no_size_is_named():
    model = Model.of(CONFIGS["llava-1.5-7b"])
    with pytest.raises(InvalidInput) as caught:
        model.costs(Media(0, 10), HALF)
    assert caught.value.field == "image"


def test_costs_need_no_torch():
    code = "import sys, hiprune.costs.published, hiprune.commands.flops; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_a_towers_windows_are_cut_where_the_grid_ends():
    config = {"model_type": "qwen2_5_vl", "vision_config": {"depth": 2, "fullatt_block_indexes": [1]}}
    config["vision_config"]["out_hidden_size"] = 8
    tower = TowerShape.of(config, facts_of(config))
    # 5 × 9 tokens in windows of 4 × 4: sides of 4 and 1, and of 4, 4 and 1; four patches a token
    assert tower.pairs((5, 9), 1) == (16 + 1) * (16 + 16 + 1) * 16
    assert tower.pairs((5, 9), 2) == (5 * 9 * 4) ** 2
