"""What a prefill costs, counted from the language model's shape. Pure: no weights, no framework.

Dense multiply-adds of one sequence, 2 operations each, as hardware without causal skipping does them;
norms, rotary embedding, softmax and activations are left out (below 1 % of it).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class TextShape:
    """The shape of a decoder-only language model with gated MLPs (Llama, Mistral, Qwen2)."""

    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocab_size: int

    @classmethod
    def of(cls, config: Any) -> Self:
        """The shape in a transformers text config."""
        heads = int(config.num_attention_heads)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(
            layers=int(config.num_hidden_layers),
            hidden_size=int(config.hidden_size),
            intermediate_size=int(config.intermediate_size),
            heads=heads,
            key_value_heads=int(getattr(config, "num_key_value_heads", None) or heads),
            head_dim=int(head_dim),
            vocab_size=int(config.vocab_size),
        )


def prefill_flops(shape: TextShape, tokens: int) -> float:
    """Floating-point operations of a prefill of `tokens` tokens, logits of the last one included."""
    queries = shape.heads * shape.head_dim
    keys = shape.key_value_heads * shape.head_dim
    projections = shape.hidden_size * (2 * queries + 2 * keys)  # q and o; k and v
    mlp = 3 * shape.hidden_size * shape.intermediate_size  # gate, up, down
    attention = 2 * tokens * queries  # QK^T and AV, for each query
    macs = shape.layers * tokens * (projections + mlp + attention) + shape.hidden_size * shape.vocab_size
    return 2.0 * macs
