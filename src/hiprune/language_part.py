"""The language model inside a vision-language checkpoint: its keys and its config. Loads nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

LAYOUTS: Final[Mapping[str, str]] = {
    r"^language_model\.model\.": "model.",
    r"^language_model\.lm_head": "lm_head",
    r"^model\.language_model\.": "model.",
}
"""Patterns of its keys in the layouts on disk, and what stands in their place in a model of its own."""

_OWN: Final = re.compile(r"^(model\.(embed_tokens|layers|norm)|lm_head)\.")


def language_name(stored: str) -> str | None:
    """What a tensor of the language model is called in a checkpoint of its own; None for another part's."""
    name = stored
    for pattern, replacement in LAYOUTS.items():
        name = re.sub(pattern, replacement, name)
    return name if _OWN.match(name) else None


def language_config(config: Any) -> Any:
    """The text part of a transformers config; changed in place to stand alone."""
    text = config.get_text_config()
    if text is not config:
        # where stock ties the output to the input embeddings, which the whole model's config decides
        text.tie_word_embeddings = config.tie_word_embeddings
    return text


def has_mrope(text: Any) -> bool:
    """Whether a language model's positions have three axes: time, row and column."""
    return "mrope_section" in (getattr(text, "rope_parameters", None) or {})
