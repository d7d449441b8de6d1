"""`hiprune up` and `hiprune demo`: the whole service on this machine, to stay or to be looked at."""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated

import typer

from hiprune.commands import options
from hiprune.commands.options import AsJson, err, out
from hiprune.config import EMBEDDED_MODEL
from hiprune.errors import HipruneError

_VARIABLES = {"pruner": "HIPRUNE_PRUNER_ADDRESS", "encoder": "HIPRUNE_ENCODER_ADDRESS"}

_Port = Annotated[
    int, typer.Option(help="port of 127.0.0.1 for clients; 0: any that is free", min=0, max=65535)
]


def up(
    port: Annotated[int, typer.Option(help="port of the llm service on 127.0.0.1", min=0, max=65535)] = 50053,
    model: Annotated[str, typer.Option(help="Hugging Face directory or hub id")] = str(EMBEDDED_MODEL),
    redis: Annotated[bool, typer.Option(help="cache in a private Redis, else in the process")] = True,
    http_port: Annotated[
        int, typer.Option(help="port of the HTTP gateway on 127.0.0.1, where it is installed", max=65535)
    ] = 8080,
    pruner_port: _Port = 50052,
    encoder_port: _Port = 50051,
) -> None:
    """Runs Redis, the three services and the HTTP gateway on this machine until Ctrl-C."""
    from hiprune.stack import Stack, StackError

    _leave_in_order()
    has_gateway = bool(importlib.util.find_spec("fastapi") and importlib.util.find_spec("uvicorn"))
    if has_gateway and port and port == http_port:
        raise typer.BadParameter(f"{port} is --port too, expected another", param_hint="--http-port")
    also = ports({"pruner": pruner_port, "encoder": encoder_port}, {port, http_port})
    try:
        with Stack(
            model=model,
            port=port,
            redis=redis,
            also=also,
            environ=tenants_for_all(os.environ),
            progress=lambda step: err.print(f"[dim]{step}[/dim]"),
        ) as stack:
            for service, number in also.items():
                out.print(f"ready: [bold]127.0.0.1:{number}[/bold]   (the {service} alone)")
            if has_gateway:
                gateway = stack.start_gateway(http_port)
                out.print(f"ready: [bold]http://{gateway}/[/bold]   (for a browser: the playground)")
                out.print(f"ready: [bold]http://{gateway}/v1[/bold]   (for clients of OpenAI's API)")
            out.print(f"ready: [bold]{stack.address}[/bold]   (Ctrl-C stops it)")
            out.print(f'try:   hiprune ask IMAGE "question" --address {stack.address}', markup=False)
            while not (ended := [name for name, each in stack.processes.items() if each.poll() is not None]):
                time.sleep(0.5)
            err.print(f"[red]{ended[0]} ended:[/red]\n{stack.log_of(ended[0])[-2000:]}")
            raise typer.Exit(1)
    except StackError as error:
        err.print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(1) from error


def demo(
    folder: Annotated[Path, typer.Option(help="where the overlay picture goes")] = Path("out"),
    as_json: AsJson = False,
) -> None:
    """Starts everything, asks the sample questions with three methods, and stops it again."""
    from hiprune.demo import run_demo
    from hiprune.stack import StackError

    _leave_in_order()
    try:
        content = run_demo(out, folder, quiet=as_json)
    except HipruneError as error:
        options.fail(error, as_json=as_json)
    except StackError as error:
        raise options.stop(str(error), reason="NOT_STARTED", as_json=as_json) from error
    if as_json:
        options.print_json(content)


def tenants_for_all(environ: Mapping[str, str]) -> dict[str, str]:
    """Where the llm has tenants, the pruner and the encoder have the same, unless told otherwise.

    Their ports would be a way around the keys, and on them nobody but a tenant has business.
    """
    file = environ.get("HIPRUNE_LLM_TENANTS", "")
    names = ("HIPRUNE_PRUNER_TENANTS", "HIPRUNE_ENCODER_TENANTS")
    return {name: file for name in names if file and name not in environ}


def ports(wanted: Mapping[str, int], given: Collection[int] = ()) -> dict[str, int]:
    """The ports, free ones in the place of those that are taken, which a line says.

    `given` are those of others that have yet to listen.
    """
    from hiprune.stack import free_port, is_free

    found: dict[str, int] = {}
    for service, port in wanted.items():
        others = {*given, *found.values()}
        number = port
        while not number or number in others or not is_free(number):
            number = free_port()
        found[service] = number
        if number != port:
            why = f"port {port} is taken: " if port else ""
            err.print(
                f"{why}the {service} is at {_VARIABLES[service]}=127.0.0.1:{number}",
                style="yellow" if port else "dim",
                highlight=False,
            )
    return found


def _leave_in_order() -> None:
    """Any request to stop ends the stack front to back, once: a second one does not interrupt that."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def leave(number: int, frame: object) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(0)

    for number in numbers:
        signal.signal(number, leave)
