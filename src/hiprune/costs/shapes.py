"""The shapes that decide what a model costs, by its `config.json`: tower, projector, language model, text
encoder; and what a forward through each of them takes. Pure: no weights, no framework.

A multiply-add is 2 floating-point operations. Counted are matrix products, convolutions and attention, dense,
as hardware without causal skipping does them; norms, rotary embedding, softmax, activations and biases are
left out (below 1 % of it). What a config leaves unsaid is what transformers takes for it.

Letters: n rows of a sequence, N tokens of one view over an H×W grid, D channels of the tower, L layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from hiprune.families import Facts, UnsupportedModel

Grid = tuple[int, int]
"""H, W of one view, in tokens as they leave the tower."""

_UNSAID: Final[Mapping[str, Mapping[str, Any]]] = {
    "llama": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    },
    "mistral": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    },
    "qwen2": {
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 151936,
    },
    "qwen2_5_vl_text": {
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
    },
    "clip_vision_model": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "patch_size": 32,
        "image_size": 224,
    },
    "siglip_vision_model": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "patch_size": 16,
        "image_size": 224,
    },
    "qwen2_5_vl_vision": {
        "hidden_size": 3584,
        "intermediate_size": 3420,
        "depth": 32,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "out_hidden_size": 3584,
        "fullatt_block_indexes": (7, 15, 23, 31),
    },
    "clip_text_model": {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "max_position_embeddings": 77,
        "vocab_size": 49408,
        "projection_dim": 512,
    },
}
"""Defaults of transformers' configs, which files of `save_pretrained` leave out."""

_BIASED_TEXT: Final = frozenset({"qwen2", "qwen2_5_vl_text", "qwen2_5_vl"})
"""Language models whose queries, keys and values have biases without saying so."""


def filled(config: Mapping[str, Any], model_type: str) -> Mapping[str, Any]:
    """A part's config with what it leaves unsaid. `model_type` is what it is where it does not say that."""
    kind = str(config.get("model_type") or model_type)
    said = {key: value for key, value in config.items() if value is not None}
    return {**_UNSAID.get(kind, {}), **said, "model_type": kind}


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
    tied: bool = False
    """Whether the output matrix is the input embeddings."""
    biased: bool = False
    """Whether queries, keys and values have biases."""

    @classmethod
    def of(cls, config: Mapping[str, Any], *, tied: bool | None = None) -> Self:
        """The shape in a language model's config, as JSON. Raises UnsupportedModel for what it lacks."""
        text = filled(config, "llama")
        try:
            heads = int(text["num_attention_heads"])
            return cls(
                layers=int(text["num_hidden_layers"]),
                hidden_size=int(text["hidden_size"]),
                intermediate_size=int(text["intermediate_size"]),
                heads=heads,
                key_value_heads=int(text.get("num_key_value_heads") or heads),
                head_dim=int(text.get("head_dim") or int(text["hidden_size"]) // heads),
                vocab_size=int(text["vocab_size"]),
                tied=bool(text.get("tie_word_embeddings")) if tied is None else tied,
                biased=text["model_type"] in _BIASED_TEXT or bool(text.get("attention_bias")),
            )
        except KeyError as error:
            raise UnsupportedModel(f"config.json: the language model has no {error}") from error

    @property
    def queries(self) -> int:
        """Channels of all queries."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Channels of all keys; as many of values."""
        return self.key_value_heads * self.head_dim

    @property
    def linear_macs(self) -> int:
        """Multiply-adds of one token in the matrices of all layers."""
        projections = self.hidden_size * (2 * self.queries + 2 * self.keys)  # q and o; k and v
        mlp = 3 * self.hidden_size * self.intermediate_size  # gate, up, down
        return self.layers * (projections + mlp)

    @property
    def head_macs(self) -> int:
        """Multiply-adds of one token's logits."""
        return self.hidden_size * self.vocab_size

    @property
    def parameters(self) -> int:
        """Numbers in its weights."""
        biases = self.queries + 2 * self.keys if self.biased else 0
        layers = self.linear_macs + self.layers * (2 * self.hidden_size + biases)
        return layers + self.hidden_size + self.head_macs * (1 if self.tied else 2)

    def kv_bytes(self, tokens: int, number_bytes: int = 2) -> int:
        """Bytes of the keys and values of so many tokens; `number_bytes` of each number."""
        return 2 * self.layers * self.keys * number_bytes * tokens


def prefill_flops(shape: TextShape, tokens: int) -> float:
    """Operations of a prefill of `tokens` tokens, logits of the last one included."""
    attention = 2 * tokens * shape.queries * shape.layers  # QK^T and AV, for each query
    return 2.0 * (tokens * (shape.linear_macs + attention) + shape.head_macs)


def decode_flops(shape: TextShape, context: int) -> float:
    """Operations of one more token, whose query meets `context` keys, its own among them."""
    return 2.0 * (shape.linear_macs + 2 * context * shape.queries * shape.layers + shape.head_macs)


_DIVPRUNE_TABLE: Final = 4096
"""Most tokens of which DivPrune holds every distance; a test holds it to the pruner."""


def divprune_pairs(tokens: int, keep: int) -> int:
    """Cosines that DivPrune computes to choose `keep` of `tokens`; 0 where there is nothing to choose."""
    if keep >= tokens:
        return 0
    again = 0 if tokens <= _DIVPRUNE_TABLE else keep - 1  # a pass for each chosen token but the last
    return tokens * (tokens + again)


@dataclass(frozen=True, slots=True)
class TowerShape:
    """A vision tower up to its feature layer: CLIP, SigLIP, or Qwen2.5-VL's with windows and a merger."""

    layers: int
    """Layers that run."""
    hidden_size: int
    """D inside the tower."""
    intermediate_size: int
    gated: bool
    """MLPs of three matrices and not two."""
    patch_values: int
    """Numbers in a patch of pixels."""
    positions: int
    """Rows of learned positions; 0 where positions are rotary."""
    prefix: int = 0
    """Rows beside the patches: a CLS."""
    merge: int = 1
    """Patches along a side of what leaves the tower as one token."""
    out_size: int = 0
    """Channels behind the merger; 0 without one."""
    window: int = 0
    """Tokens along a window's side; 0: every layer sees all."""
    whole: frozenset[int] = frozenset()
    """Layers, from 1, that see all where others look within windows."""
    patch_bias: bool = False
    norms_around: int = 2
    """Norms outside the layers that are loaded."""

    @classmethod
    def of(cls, config: Mapping[str, Any], facts: Facts) -> Self:
        """The tower in a checkpoint's config.json. Raises UnsupportedModel for what that lacks."""
        try:
            if facts.family == "qwen2_5_vl":
                return cls._qwen(filled(config["vision_config"], "qwen2_5_vl_vision"))
            onevision = facts.family == "llava_onevision"
            kind = "siglip_vision_model" if onevision else "clip_vision_model"
            vision = filled(config["vision_config"], kind)
            patch = int(vision["patch_size"])
            prefix = 1 if facts.has_cls else 0
            return cls(
                layers=facts.deep_layer,
                hidden_size=int(vision["hidden_size"]),
                intermediate_size=int(vision["intermediate_size"]),
                gated=False,
                patch_values=int(vision.get("num_channels", 3)) * patch**2,
                positions=(int(vision["image_size"]) // patch) ** 2 + prefix,
                prefix=prefix,
                patch_bias=onevision,
                # CLIP: before the layers and behind them; SigLIP's last is not for features
                norms_around=0 if onevision else 2,
            )
        except KeyError as error:
            raise UnsupportedModel(f"config.json: the vision tower has no {error}") from error

    @classmethod
    def _qwen(cls, vision: Mapping[str, Any]) -> Self:
        patch, merge = int(vision["patch_size"]), int(vision["spatial_merge_size"])
        channels = int(vision.get("in_channels") or vision.get("in_chans") or 3)
        return cls(
            layers=int(vision["depth"]),
            hidden_size=int(vision["hidden_size"]),
            intermediate_size=int(vision["intermediate_size"]),
            gated=True,
            patch_values=channels * int(vision["temporal_patch_size"]) * patch**2,
            positions=0,
            merge=merge,
            out_size=int(vision["out_hidden_size"]),
            window=int(vision["window_size"]) // merge // patch,
            whole=frozenset(int(index) + 1 for index in vision["fullatt_block_indexes"]),
            norms_around=0,
        )

    def rows(self, grid: Grid) -> int:
        """Rows of one view inside the tower."""
        return grid[0] * grid[1] * self.merge**2 + self.prefix

    def pairs(self, grid: Grid, layer: int) -> int:
        """Query and key pairs of one view in a layer, from 1."""
        if not self.window or layer in self.whole:
            return self.rows(grid) ** 2
        down, across = (sum(part**2 for part in _cut(side, self.window)) for side in grid)
        return down * across * self.merge**4

    def flops(self, grids: Iterable[Grid]) -> float:
        """Operations of one forward over views of these grids, up to what leaves the tower."""
        width, macs = self.hidden_size, 0
        layer = width * (4 * width + (3 if self.gated else 2) * self.intermediate_size)
        wide = width * self.merge**2  # what the merger takes
        for grid in grids:
            tokens, rows = grid[0] * grid[1], self.rows(grid)
            macs += tokens * self.merge**2 * self.patch_values * width
            macs += self.layers * rows * layer
            macs += sum(2 * width * self.pairs(grid, number) for number in range(1, self.layers + 1))
            macs += tokens * wide * (wide + self.out_size) if self.out_size else 0
        return 2.0 * macs

    def capture_flops(self, grids: Iterable[Grid], layers: Iterable[int]) -> float:
        """Operations of recording these layers' scores: QKᵀ once more, and the CLS's row where there is one.

        A kernel may do more of them to hold less.
        """
        chosen = list(layers)
        return 2.0 * sum(
            self.hidden_size * (self.pairs(grid, layer) + self.prefix * self.rows(grid))
            for grid in grids
            for layer in chosen
        )

    @property
    def parameters(self) -> int:
        """Numbers in the weights that are loaded."""
        width, inner = self.hidden_size, self.intermediate_size
        embedding = self.patch_values * width + (self.positions + self.prefix + self.patch_bias) * width
        if self.gated:  # norms without biases
            layer = 4 * width**2 + 4 * width + 3 * width * inner + 2 * inner + width + 2 * width
        else:
            layer = 4 * width**2 + 4 * width + 2 * width * inner + inner + width + 4 * width
        wide = width * self.merge**2
        merger = width + wide * (wide + 1) + (wide + 1) * self.out_size if self.out_size else 0
        return embedding + self.layers * layer + self.norms_around * 2 * width + merger


@dataclass(frozen=True, slots=True)
class ProjectorShape:
    """Two matrices from D to H and from H to H, with biases; nothing where the tower ends in H itself."""

    channels: int
    """D; 0: there is no projector."""
    hidden_size: int
    """H."""
    newline: bool = False
    """Whether an embedding that ends a row of tiles comes with it."""

    def flops(self, tokens: int) -> float:
        """Operations of projecting so many tokens."""
        if not self.channels:
            return 0.0
        return 2.0 * tokens * self.hidden_size * (self.channels + self.hidden_size)

    @property
    def parameters(self) -> int:
        """Numbers in its weights."""
        if not self.channels:
            return 0
        return self.hidden_size * (self.channels + self.hidden_size + 2 + self.newline)


@dataclass(frozen=True, slots=True)
class TextEncoderShape:
    """CLIP's text side, and the projections of both sides into the space that they share."""

    layers: int
    hidden_size: int
    intermediate_size: int
    positions: int
    vocab_size: int
    projection: int
    """A: channels of the shared space."""
    vision_size: int
    """D of the tower's tokens, which are projected too."""

    @classmethod
    def of(cls, config: Mapping[str, Any], vision_size: int) -> Self:
        """The shape in the config.json of a CLIP."""
        text = filled(config["text_config"], "clip_text_model")
        return cls(
            layers=int(text["num_hidden_layers"]),
            hidden_size=int(text["hidden_size"]),
            intermediate_size=int(text["intermediate_size"]),
            positions=int(text["max_position_embeddings"]),
            vocab_size=int(text["vocab_size"]),
            projection=int(config.get("projection_dim") or text["projection_dim"]),
            vision_size=vision_size,
        )

    def flops(self, tokens: int) -> float:
        """Operations of reading a question of `tokens` ≥ 1 tokens, in chunks with a begin and an end each."""
        most, macs = self.positions - 2, 0
        for start in range(0, tokens, most):
            rows = min(most, tokens - start) + 2
            layer = 4 * self.hidden_size**2 + 2 * self.hidden_size * self.intermediate_size
            macs += self.layers * rows * (layer + 2 * rows * self.hidden_size)
            # twice: stock projects the row that it takes for the last, and the pruner the one that is
            macs += 2 * self.hidden_size * self.projection
        return 2.0 * macs

    def align_flops(self, tokens: int) -> float:
        """Operations of bringing so many visual tokens into the shared space."""
        return 2.0 * tokens * self.vision_size * self.projection

    @property
    def parameters(self) -> int:
        """Numbers in the weights that are loaded: the text side's, and those of the tokens' projection."""
        width, inner = self.hidden_size, self.intermediate_size
        layer = 4 * width**2 + 4 * width + 2 * width * inner + inner + width + 4 * width
        text = (self.vocab_size + self.positions) * width + self.layers * layer + 2 * width
        return text + (width + self.vision_size) * self.projection + 2 * self.vision_size


def _cut(side: int, window: int) -> list[int]:
    """A side of a grid, cut into windows: the last may be narrower."""
    whole, rest = divmod(side, window)
    return [window] * whole + ([rest] if rest else [])
