"""Claims about the estimate of a prefill's work, against torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from hiprune.config import EMBEDDED_MODEL
from services.llm.flops import TextShape, prefill_flops

SIZES = {"vocab_size": 200, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3}


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
def test_the_estimate_is_within_a_hundredth_of_what_torch_counts(model_class, config, tokens):
    config._attn_implementation = "eager"  # torch counts its matrix products, and no fused CPU kernel
    model = model_class(config).eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(torch.zeros((1, tokens), dtype=torch.long), logits_to_keep=1)
    counted = counter.get_total_flops()
    assert prefill_flops(TextShape.of(config), tokens) == pytest.approx(counted, rel=0.01)


def test_fewer_visual_tokens_save_what_the_paper_saves():
    # LLaVA-1.5-7B, section 5: 8.63 TFLOPs unpruned (576 + text), 3.56 at 192, 1.87 at 64: 0.0132 a token
    shape = TextShape.of(
        LlamaConfig(
            vocab_size=32064,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
        )
    )
    saved = (prefill_flops(shape, 576 + 60) - prefill_flops(shape, 192 + 60)) / 384 / 1e12
    assert saved == pytest.approx(0.0132, rel=0.05)


def test_the_embedded_models_config_has_a_shape():
    shape = TextShape.of(AutoConfig.from_pretrained(EMBEDDED_MODEL).text_config)
    assert prefill_flops(shape, 200) > prefill_flops(shape, 100) > 0
