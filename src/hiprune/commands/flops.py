"""`hiprune flops`: what a model costs before and after pruning, from its config.json. Loads no weights."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Annotated, Any, Final, get_args

import typer
from rich.table import Table

from hiprune.budgets import Budget
from hiprune.commands.options import AsJson, out, print_json
from hiprune.costs import PAPERS_TEXT_TOKENS, PIXEL_BOUNDS, Costs, Media, Method, Model
from hiprune.costs.published import CLIP_L_336, CONFIGS
from hiprune.errors import InvalidInput
from hiprune.families import UnsupportedModel
from hiprune.policies import set_keep
from hiprune.v1 import pruner_service_pb2

_BYTES: Final = {"bf16": 2, "f16": 2, "f32": 4}
_STAGES: Final = (
    ("vision", "vision tower"),
    ("capture", "score capture"),
    ("align", "tokens into the question's space"),
    ("text", "text encoder"),
    ("select", "selection"),
    ("project", "projector"),
    ("prefill", "prefill"),
    ("first_token", "until the first token"),
    ("decode", "decode, a token"),
)


def flops(
    model: Annotated[
        str, typer.Option(help=f"directory, hub id, or a published one by name: {', '.join(CONFIGS)}")
    ] = "llava-1.5-7b",
    keep: Annotated[
        str, typer.Option(help="share (1/3, 0.33, 33%) or number (65) of tokens to keep")
    ] = "1/3",
    method: Annotated[str, typer.Option(help=", ".join(get_args(Method)))] = "hiprune",
    image: Annotated[str, typer.Option(help="size of the image in pixels, WxH")] = "672x672",
    frames: Annotated[
        int | None, typer.Option(help="frames of that size instead: a video", show_default=False)
    ] = None,
    text_tokens: Annotated[
        int, typer.Option(help="tokens of the prompt that are not visual", min=0)
    ] = PAPERS_TEXT_TOKENS,
    question_tokens: Annotated[
        int, typer.Option(help="tokens of the question, as hiprune++'s text encoder has them", min=1)
    ] = 16,
    batch: Annotated[int, typer.Option(help="questions at a time", min=1)] = 1,
    dtype: Annotated[str, typer.Option(help=", ".join(_BYTES))] = "bf16",
    as_json: AsJson = False,
) -> None:
    """Counts a question's operations and bytes, with every visual token and with those kept.

    A multiply-add is 2 operations; matrix products and attention are counted. Selecting by scores compares
    and multiplies nothing, so it counts as 0.
    """
    if method not in get_args(Method):
        raise typer.BadParameter(
            f"{method!r}: expected one of {', '.join(get_args(Method))}", param_hint="--method"
        )
    if dtype not in _BYTES:
        raise typer.BadParameter(f"{dtype!r}: expected one of {', '.join(_BYTES)}", param_hint="--dtype")
    config, paired, bounds = _read(model)
    try:
        costs = Model.of(config, paired=paired).costs(
            _media(image, frames),
            _budget(keep),
            method=method,  # type: ignore[arg-type]  # one of its names, see above
            text_tokens=text_tokens,
            question_tokens=question_tokens,
            batch=batch,
            number_bytes=_BYTES[dtype],
            pixel_bounds=bounds,
        )
    except (UnsupportedModel, KeyError, TypeError) as error:
        raise typer.BadParameter(f"{model}: {error}", param_hint="--model") from error
    except InvalidInput as error:
        hint = {"frames": "--frames", "image": "--image"}.get(error.field, "--keep")
        raise typer.BadParameter(str(error), param_hint=hint) from error
    if as_json:
        print_json({"model": model, "method": method, "batch": batch, **_content(costs)})
    else:
        _show(costs, f"{model}, {method}")


def _read(model: str) -> tuple[Mapping[str, Any], Mapping[str, Any] | None, tuple[int, int]]:
    """A model's config.json, that of its paired CLIP, and its bounds on an image's pixels."""
    if model in CONFIGS:
        return CONFIGS[model], CLIP_L_336, PIXEL_BOUNDS
    from hiprune.checkpoints import CheckpointError, image_processor_settings, locate, read_json

    try:
        path = locate(model, weights=False)
        config = read_json(path / "config.json")
        beside = path.parent / "clip" / "config.json"
        paired = read_json(beside) if beside.is_file() else CLIP_L_336
        settings = image_processor_settings(path) if config.get("model_type") == "qwen2_5_vl" else {}
    except CheckpointError as error:
        names = ", ".join(CONFIGS)
        raise typer.BadParameter(f"{error}; or one of {names}", param_hint="--model") from error
    return config, paired, _bounds(settings)


def _bounds(settings: Mapping[str, Any]) -> tuple[int, int]:
    """Least and most pixels, in either spelling of an image processor's settings."""
    size = settings.get("size") or {}
    least = settings.get("min_pixels") or size.get("shortest_edge") or PIXEL_BOUNDS[0]
    most = settings.get("max_pixels") or size.get("longest_edge") or PIXEL_BOUNDS[1]
    return int(least), int(most)


def _media(image: str, frames: int | None) -> Media:
    size = re.fullmatch(r"(\d{1,6})[x×](\d{1,6})", image)
    if size is None:
        raise typer.BadParameter(f"{image!r}: expected WxH in pixels, as 672x672", param_hint="--image")
    return Media(height=int(size[2]), width=int(size[1]), frames=frames)


def _budget(keep: str) -> Budget:
    made = pruner_service_pb2.PrunePolicy()
    try:
        set_keep(made, keep)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--keep") from error
    if made.WhichOneof("budget") == "keep_count":
        return Budget(keep_count=made.keep_count)
    return Budget(keep_ratio=made.keep_ratio)


def _content(costs: Costs) -> dict[str, Any]:
    """As JSON: operations and bytes."""
    runs = {
        name: {**dataclasses.asdict(run), "first_token": run.first_token}
        for name, run in (("before", costs.before), ("after", costs.after))
    }
    return {**runs, "weights_bytes": dict(costs.weights_bytes)}


def _show(costs: Costs, title: str) -> None:
    """As a person reads it."""
    table = Table(title=title)
    for heading in ("", "all tokens", "kept", "kept / all"):
        table.add_column(heading, justify="left" if not heading else "right")
    before, after = costs.before, costs.after
    for name in ("visual_tokens", "prompt_tokens"):
        one, other = getattr(before, name), getattr(after, name)
        table.add_row(name.replace("_", " "), str(one), str(other), _ratio(other, one))
    for name, words in _STAGES:
        one, other = getattr(before, name), getattr(after, name)
        if one or other:
            table.add_row(f"{words}, TFLOPs", _short(one / 1e12), _short(other / 1e12), _ratio(other, one))
    for name, words in (("kv_bytes", "keys and values"), ("wire_bytes", "visual tokens sent")):
        one, other = getattr(before, name), getattr(after, name)
        table.add_row(f"{words}, MiB", _short(one / 2**20), _short(other / 2**20), _ratio(other, one))
    out.print(table)
    weights = ", ".join(f"{part} {size / 2**30:.2f}" for part, size in costs.weights_bytes.items() if size)
    out.print(f"weights, GiB: {weights}", markup=False, highlight=False)


def _ratio(after: float, before: float) -> str:
    return f"{after / before:.3f}" if before else ""


def _short(value: float) -> str:
    """Three digits that count."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
