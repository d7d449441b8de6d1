"""What each model family is: facts read from a checkpoint's `config.json`, no weights and no framework.

A family is a module here named by its Hugging Face `model_type`, with one function, `facts(config)`; its
two adapters carry the same name under `services/encoder/families/` and `services/llm/families/`.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal


class UnsupportedModel(Exception):
    """A checkpoint of a family, or with a setting, that is not served. The message says which are."""


@dataclass(frozen=True, slots=True)
class Facts:
    """One checkpoint's facts. Layers are 1-based; D channels, H×W the token grid of one view."""

    family: str
    layers: int
    """Encoder layers in the checkpoint, L."""
    object_layer: int
    """The default: the one that the checkpoint names, else the paper's for this family, a middle one."""
    deep_layer: int
    """The layer whose output is the visual feature; nothing behind it runs."""
    hidden_size: int
    """Channels of a visual token before the projector, D."""
    grid: tuple[int, int] | None
    """H, W of every view where the family has one fixed grid, else None."""
    vision_keys: re.Pattern[str]
    """Matches the prefix of every vision tensor on disk, in all layouts; what is left is its normal name."""
    paired_text_model: str
    """Hub id of the text encoder trained with the vision tower; empty when the family has none, and the
    question is compared in the language model's input space instead."""
    takes_video: bool = False
    fixed_tokens: int | None = None
    """Tokens of every media item, where that is one number."""
    ratio_of: Literal["media", "view"] = "media"
    """What a keep_ratio counts: a media item's tokens, shared out evenly over its views, or each view's."""
    text_keys: re.Pattern[str] | None = None
    """Matches the key of the language model's input embeddings, where questions are compared in its space."""
    has_cls: bool = False
    """Whether the tower has a CLS token, whose own attention is then recorded too."""
    compares: Literal["aligned", "features"] = "aligned"
    """What of a view is compared with the question: `aligned`, or `features` that are in its space."""


def families() -> list[str]:
    """Names of the families that are served."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def facts_of(config: Mapping[str, Any]) -> Facts:
    """Facts of the checkpoint whose `config.json` is given. Raises UnsupportedModel."""
    model_type = str(config.get("model_type", ""))
    if model_type not in families():
        raise UnsupportedModel(
            f"config.json: model_type is {model_type!r}, expected one of {', '.join(families())}"
        )
    facts: Facts = importlib.import_module(f"{__name__}.{model_type}").facts(config)
    return replace(facts, object_layer=_own_object_layer(config, facts))


def _own_object_layer(config: Mapping[str, Any], facts: Facts) -> int:
    """The layer in `"hiprune": {"object_layer": 7}` of `config.json`: each tower meets objects elsewhere."""
    own = config.get("hiprune", {})
    if not isinstance(own, Mapping) or own.keys() - {"object_layer"}:
        raise UnsupportedModel(f'config.json: hiprune is {own!r}, expected {{"object_layer": a layer}}')
    layer = own.get("object_layer", facts.object_layer)
    if type(layer) is not int or not 1 <= layer <= facts.deep_layer:
        raise UnsupportedModel(
            f"config.json: hiprune.object_layer is {layer!r}, expected a layer from 1 to the deep one, "
            f"{facts.deep_layer}"
        )
    return layer
