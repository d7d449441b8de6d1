"""LLaVA-1.5: one square view through a CLIP tower, features from the layer before the last."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from hiprune.families import Facts, UnsupportedModel

VISION_KEYS: Final = re.compile(r"^(?:model\.)?vision_tower\.(?:vision_model\.)?")

# CLIP-L/14-336: layer 9 of 24 (paper, section 4.1). Other depths keep the proportion.
_OBJECT_LAYER_SHARE: Final = 9 / 24


def facts(config: Mapping[str, Any]) -> Facts:
    """Facts of a LLaVA-1.5 checkpoint. Raises UnsupportedModel for feature settings it does not use."""
    vision = config["vision_config"]
    layers = int(vision["num_hidden_layers"])
    feature_layer = config.get("vision_feature_layer", -2)
    if not isinstance(feature_layer, int):
        raise UnsupportedModel(
            f"config.json: vision_feature_layer is {feature_layer}, expected a single layer such as -2"
        )
    # hidden_states has L + 1 entries, the embeddings first, so entry i is the output of 1-based layer i
    deep_layer = feature_layer if feature_layer >= 0 else layers + 1 + feature_layer
    if not 1 <= deep_layer <= layers:
        raise UnsupportedModel(
            f"config.json: vision_feature_layer is {feature_layer}, expected a layer of the {layers}"
        )
    strategy = config.get("vision_feature_select_strategy", "default")
    if strategy != "default":
        raise UnsupportedModel(
            f"config.json: vision_feature_select_strategy is {strategy!r}, expected 'default' (CLS dropped)"
        )
    side = int(vision["image_size"]) // int(vision["patch_size"])
    return Facts(
        family="llava",
        layers=layers,
        object_layer=min(max(1, round(layers * _OBJECT_LAYER_SHARE)), deep_layer),
        deep_layer=deep_layer,
        hidden_size=int(vision["hidden_size"]),
        grid=(side, side),
        vision_keys=VISION_KEYS,
        paired_text_model="openai/clip-vit-large-patch14-336",
        fixed_tokens=side * side,
        has_cls=True,
    )
