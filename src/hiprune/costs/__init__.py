"""What a question about an image costs, before and after pruning: operations and bytes by a config.json.

The one place of such figures: the llm's usage, `hiprune flops` and the benchmarks read them here.
What is counted, and what is not, stands in `hiprune.costs.shapes`. It is what the method needs: a tower that
ends at its feature layer, the scores that the method reads, kept tokens alone in the projector. A caching
pruner asks for more, the scores of both layers and aligned tokens whatever the method: below 0.03 % of
LLaVA-1.5-7B's. Pure: no weights, no framework.

The paper's figures for LLaVA-1.5-7B (8.63, 3.56, 2.71, 1.87 TFLOPs with 576, 192, 128, 64 visual tokens) are
those of the prefill with 77 tokens of text: see docs/decisions/0026-what-a-flop-is.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from hiprune.budgets import Budget
from hiprune.costs.media import PIXEL_BOUNDS, Media, Seen, seen
from hiprune.costs.shapes import (
    ProjectorShape,
    TextEncoderShape,
    TextShape,
    TowerShape,
    decode_flops,
    divprune_pairs,
    prefill_flops,
)
from hiprune.families import Facts, facts_of

__all__ = [
    "PAPERS_TEXT_TOKENS",
    "PIXEL_BOUNDS",
    "Costs",
    "Media",
    "Method",
    "Model",
    "Run",
    "TextShape",
    "TowerShape",
    "decode_flops",
    "prefill_flops",
]

Method = Literal["hiprune", "hiprune++", "visionzip", "divprune", "random", "strided"]
PAPERS_TEXT_TOKENS: Final = 77
"""Tokens of text with which the paper's four figures come out."""


@dataclass(frozen=True, slots=True)
class Run:
    """One way to answer: operations of each stage for all items of a batch, and bytes."""

    visual_tokens: int
    """That enter the language model, of one item."""
    prompt_tokens: int
    """In all, of one item."""
    vision: float
    capture: float
    """Recording the layers' scores."""
    align: float
    """Bringing tokens into the question's space, for hiprune++."""
    text: float
    """Reading the question, for hiprune++ with a paired text encoder."""
    select: float
    """Multiply-adds of the selection; comparisons of scores are not counted."""
    project: float
    prefill: float
    decode: float
    """Of one token behind the prompt."""
    kv_bytes: int
    """Keys and values of the prompt."""
    wire_bytes: int
    """Visual tokens from the encoder's pod to the language model."""

    @property
    def first_token(self) -> float:
        """Operations until the first token."""
        parts = (self.vision, self.capture, self.align, self.text, self.select, self.project, self.prefill)
        return sum(parts)


@dataclass(frozen=True, slots=True)
class Costs:
    """What one question costs with every token and with those kept, and what the weights take."""

    before: Run
    after: Run
    weights_bytes: Mapping[str, int]
    """By part."""


@dataclass(frozen=True, slots=True)
class Model:
    """Everything of a model that decides what it costs."""

    config: Mapping[str, Any]
    facts: Facts
    tower: TowerShape
    towers: int
    """Vision towers that are loaded, of which each item takes one."""
    projector: ProjectorShape
    text: TextShape
    paired: TextEncoderShape | None
    """The text encoder of hiprune++, where the family has one."""

    @classmethod
    def of(cls, config: Mapping[str, Any], *, paired: Mapping[str, Any] | None = None) -> Model:
        """The model of a config.json; `paired` is that of its CLIP. Raises UnsupportedModel."""
        facts = facts_of(config)
        tower = TowerShape.of(config, facts)
        nested = config.get("text_config")
        own = nested if isinstance(nested, Mapping) else config
        kinds = {"qwen2_5_vl": "qwen2_5_vl_text", "llava_onevision": "qwen2"}
        kind = kinds.get(facts.family, "llama")
        # the whole model's word decides, where it has one
        tied = config.get("tie_word_embeddings", own.get("tie_word_embeddings"))
        text = TextShape.of({**own, "model_type": _kind(own, kind)}, tied=bool(tied))
        has_projector = facts.family != "qwen2_5_vl"
        return cls(
            config=config,
            facts=facts,
            tower=tower,
            towers=2 if facts.family == "video_llava" else 1,
            projector=ProjectorShape(
                facts.hidden_size if has_projector else 0,
                text.hidden_size,
                newline=facts.family in {"llava_next", "llava_onevision"},
            ),
            text=text,
            paired=TextEncoderShape.of(paired, tower.hidden_size)
            if paired is not None and facts.text_keys is None
            else None,
        )

    def costs(
        self,
        media: Media,
        budget: Budget,
        *,
        method: Method = "hiprune",
        text_tokens: int = PAPERS_TEXT_TOKENS,
        question_tokens: int = 16,
        batch: int = 1,
        number_bytes: int = 2,
        pixel_bounds: tuple[int, int] = PIXEL_BOUNDS,
    ) -> Costs:
        """The costs of one prompt with one media item, whose ratio counts what the family's does.

        `text_tokens` are all of the prompt that are not visual, `question_tokens` those of the question as
        its text encoder has them; `batch` items at a time; `number_bytes` of each weight, key and value.
        Raises InvalidInput (`image`, `frames`, `policy.…`), UnsupportedModel.
        """
        shown = seen(self.config, self.facts, media, pixel_bounds=pixel_bounds)
        own = dataclasses.replace(budget, ratio_of=self.facts.ratio_of)
        keeps = own.per_view(shown.counts, shown.prefix)
        kept = sum(
            shown.prefix + min(max(1, keep - shown.prefix), count)
            for keep, count in zip(keeps, shown.valid, strict=True)
        )
        total = sum(shown.counts)
        whole = kept == total
        before = self._run(shown, total, shown.whole_rows + text_tokens, batch, number_bytes)
        after = self._run(
            shown,
            kept,
            (shown.whole_rows if whole else kept) + text_tokens,
            batch,
            number_bytes,
            method=method,
            keeps=keeps,
            question_tokens=question_tokens,
        )
        return Costs(before, after, self._weights(number_bytes, method))

    def _run(
        self,
        shown: Seen,
        visual: int,
        prompt: int,
        batch: int,
        number_bytes: int,
        *,
        method: Method | None = None,
        keeps: list[int] | None = None,
        question_tokens: int = 0,
    ) -> Run:
        """One way to answer; without a method nothing is recorded and nothing chosen."""
        facts = self.facts
        every = sum(height * width for height, width in shown.grids)
        capture = align = text = select = 0.0
        if method in {"hiprune", "hiprune++", "visionzip"}:
            layers = {facts.deep_layer} if method == "visionzip" else {facts.object_layer, facts.deep_layer}
            capture = self.tower.capture_flops(shown.grids, layers)
        if method == "hiprune++":
            compared = facts.hidden_size if facts.text_keys is not None else 0  # else it reads no question
            if self.paired is not None:
                text, compared = self.paired.flops(question_tokens), self.paired.projection
                align = self.paired.align_flops(every)
            elif (
                compared and facts.compares == "aligned"
            ):  # in the language model's space, which the projector leads to
                align, compared = self.projector.flops(every), self.projector.hidden_size
            select = 2.0 * every * compared
        if method == "divprune" and keeps is not None:
            pairs = sum(
                divprune_pairs(count, max(1, keep - shown.prefix))
                for count, keep in zip(shown.valid, keeps, strict=True)
            )
            select = 2.0 * pairs * facts.hidden_size
        return Run(
            visual_tokens=visual,
            prompt_tokens=prompt,
            vision=batch * self.tower.flops(shown.grids),
            capture=batch * capture,
            align=batch * align,
            text=batch * text,
            select=batch * select,
            project=batch * self.projector.flops(visual),
            prefill=batch * prefill_flops(self.text, prompt),
            decode=batch * decode_flops(self.text, prompt + 1),
            kv_bytes=batch * self.text.kv_bytes(prompt, number_bytes),
            wire_bytes=batch * visual * facts.hidden_size * number_bytes,
        )

    def _weights(self, number_bytes: int, method: Method) -> dict[str, int]:
        """Bytes of each part's weights. A text encoder is in float32 in the pruner, and so counted."""
        found = {
            "vision tower": self.towers * self.tower.parameters * number_bytes,
            "projector": self.projector.parameters * number_bytes,
            "language model": self.text.parameters * number_bytes,
        }
        if method == "hiprune++" and self.paired is not None:
            found["text encoder"] = self.paired.parameters * 4
        return found


def _kind(own: Mapping[str, Any], default: str) -> str:
    """The language model's `model_type`; in a flat config.json stands the whole model's, which is none."""
    said = str(own.get("model_type") or default)
    return default if said == "qwen2_5_vl" else said
