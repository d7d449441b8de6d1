"""`hiprune suggest-layer`: which encoder layer to take for the object layer of a model that nobody has tuned.

Starts an encoder on the model, asks it for every layer's scores of some pictures, and judges by
`hiprune.layer_choice`. Needs no mask, no question and no language model.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import grpc
import typer
from rich import box
from rich.table import Table

from hiprune.checkpoints import Checkpoint, CheckpointError, open_checkpoint
from hiprune.commands import options
from hiprune.commands.options import AsJson, err, out
from hiprune.errors import HipruneError, from_rpc
from hiprune.stack import Stack, StackError

if TYPE_CHECKING:
    from hiprune.layer_choice import Profile, View

PICTURES: Final = (".png", ".jpg", ".jpeg", ".webp", ".gif")
_TIMEOUT_S: Final = 600.0
_BAR: Final = 12


def suggest_layer(
    images: Annotated[
        list[Path], typer.Argument(help="pictures, or folders of them, like those the model will see")
    ],
    model: Annotated[str, typer.Option(help="Hugging Face directory or hub id")],
    as_json: AsJson = False,
) -> None:
    """Proposes an object layer, from the attention that pictures get in every layer."""
    paths = _pictures(images)
    # the encoder ends with this process, also where it is told to
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        checkpoint = open_checkpoint(model)
        views = _views(checkpoint, paths)
    except CheckpointError as error:
        raise options.stop(str(error), reason="MODEL", as_json=as_json) from error
    except StackError as error:
        raise options.stop(str(error), reason="NOT_STARTED", as_json=as_json) from error
    except HipruneError as error:
        options.fail(error, as_json=as_json)
    from hiprune import layer_choice

    found = layer_choice.profiles(views)
    layer = layer_choice.suggest(found, checkpoint.facts.deep_layer)
    if as_json:
        content = {
            "model": checkpoint.name,
            "images": len(paths),
            "object_layer": layer,
            "default_object_layer": checkpoint.facts.object_layer,
            "deep_layer": checkpoint.facts.deep_layer,
            "layers": [{**asdict(profile), "merit": profile.merit} for profile in found],
        }
        options.print_json(content)
        return
    out.print(_table(found, checkpoint, layer))
    out.print(
        f"object layer [bold]{layer}[/bold] looks at things most, and not always at the same places; "
        f"the model's default is {checkpoint.facts.object_layer}"
    )
    if len(paths) < layer_choice.ENOUGH_VIEWS:
        err.print(
            f"[yellow]from {len(paths)} pictures; from {layer_choice.ENOUGH_VIEWS} on the proposal "
            "hardly changes with them[/yellow]"
        )


def _pictures(given: Sequence[Path]) -> list[Path]:
    """The files, those of folders by name. Raises BadParameter."""
    found: list[Path] = []
    for path in given:
        if path.is_dir():
            found += sorted(each for each in path.iterdir() if each.suffix.lower() in PICTURES)
        elif path.is_file():
            found.append(path)
        else:
            raise typer.BadParameter(f"{path}: no such file or folder", param_hint="IMAGES")
    if len(found) < 2:
        raise typer.BadParameter(
            f"{len(found)} pictures, expected at least 2, better 8: one alone does not show whether a layer "
            "looks at things or at places",
            param_hint="IMAGES",
        )
    return found


def _views(checkpoint: Checkpoint, paths: Sequence[Path]) -> list[View]:
    """Every picture's first view. Raises StackError."""
    stack = Stack(model=str(checkpoint.path), redis=False)
    try:
        with options.progress() as bar:
            task = bar.add_task("loading the encoder", total=len(paths))
            stack.start_service("encoder")
            stack.wait_ready("encoder")
            bar.update(task, description="pictures")
            layers = range(1, checkpoint.facts.deep_layer + 1)
            return asyncio.run(_encode(stack.encoder_address, paths, list(layers), lambda: bar.advance(task)))
    finally:
        stack.stop()


async def _encode(
    address: str, paths: Sequence[Path], layers: list[int], step: Callable[[], None]
) -> list[View]:
    """The scores of all layers, one picture after the other. A picture that is refused ends it all."""
    from hiprune.calls import connect
    from hiprune.v1 import encoder_service_pb2, encoder_service_pb2_grpc, media_pb2

    views = []
    async with connect(address) as channel:
        stub: Any = encoder_service_pb2_grpc.EncoderServiceStub(channel)
        for path in paths:
            request = encoder_service_pb2.EncodeImageRequest(
                media=media_pb2.Media(image=path.read_bytes()), layers=layers
            )
            try:
                response = await stub.EncodeImage(request, timeout=_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                found = from_rpc(error, peer="encoder")
                found.message = f"{path}: {found.message}"
                raise found from error
            views.append(_view(response.views[0]))
            step()
    return views


def _view(message: Any) -> View:
    """The scores of a view's valid part. The first view of a tiled picture is the whole of it."""
    from hiprune import tensors
    from hiprune.layer_choice import View

    height, width = message.grid_height, message.grid_width
    top, left, down, across = 0, 0, height, width
    if message.HasField("valid"):
        valid = message.valid
        top, left, down, across = valid.top, valid.left, valid.height, valid.width
    scores = {}
    for entry in message.attention:
        plane = tensors.from_proto(entry.scores, field="scores", shape=(height * width,)).numpy()
        scores[entry.layer] = plane.reshape(height, width)[top : top + down, left : left + across].ravel()
    return View(scores, (down, across))


def _table(found: Sequence[Profile], checkpoint: Checkpoint, layer: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=f"{checkpoint.name}: the tenth of tokens that receive most")
    for heading in ("layer", "distance", "clumps", "habit", "attention", "merit"):
        table.add_column(heading, justify="right")
    table.add_column("", no_wrap=True)
    table.add_column("", no_wrap=True)
    longest = max(profile.merit for profile in found) or 1.0
    names = {checkpoint.facts.object_layer: "default", checkpoint.facts.deep_layer: "deep"}
    for profile in found:
        bar = "█" * round(_BAR * profile.merit / longest)
        note = " ".join(filter(None, ["proposed" * (profile.layer == layer), names.get(profile.layer, "")]))
        values = (profile.distance, profile.clumps, profile.habit, profile.attention, profile.merit)
        table.add_row(
            str(profile.layer),
            *(f"{value:.2f}" for value in values),
            bar,
            note,
            style="bold green" if profile.layer == layer else None,
        )
    table.caption = (
        "distance: of two such tokens, 1 is chance; clumps: neighbours among them, 0.1 is chance; habit: "
        "overlap of two pictures; merit: clumps × (1 - habit)"
    )
    return table
