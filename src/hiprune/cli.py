"""The `hiprune` command: ask, prune pictures, run the stack, see the demo. A thin skin over the client."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import time
from pathlib import Path
from typing import Annotated, Any, Final

import grpc
import typer
from google.protobuf.json_format import MessageToDict
from rich.console import Console

from hiprune import cache_cli, tenants_cli
from hiprune.auth import is_private
from hiprune.client import Answer, Client
from hiprune.config import EMBEDDED_MODEL, ConfigError
from hiprune.errors import HipruneError
from hiprune.policies import CACHE_WORDS, METHODS
from hiprune.trust import Certificates
from hiprune.v1 import llm_service_pb2, pruner_service_pb2

DEFAULT_ADDRESS: Final = "127.0.0.1:50053"

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(cache_cli.app, name="cache")
app.add_typer(tenants_cli.app, name="tenant")
out = Console()
err = Console(stderr=True)

Address = Annotated[str, typer.Option(envvar="HIPRUNE_ADDRESS", help="the llm service, HOST:PORT")]
Key = Annotated[
    str,
    typer.Option(
        envvar="HIPRUNE_KEY",
        show_envvar=True,
        show_default=False,
        help="API key; better in the variable than in a flag, which every user of the machine can read",
    ),
]
Authority = Annotated[
    str,
    typer.Option(
        envvar="HIPRUNE_TLS_CA", show_default=False, help="PEM file of the service's authority; turns TLS on"
    ),
]
Certificate = Annotated[
    str,
    typer.Option(
        envvar="HIPRUNE_TLS_CERT",
        show_default=False,
        help="PEM file of a certificate to show, where the service wants one of every client",
    ),
]
CertificateKey = Annotated[
    str, typer.Option(envvar="HIPRUNE_TLS_KEY", show_default=False, help="PEM file of its key")
]
Model = Annotated[str, typer.Option(help="Hugging Face directory or hub id")]


def parse_keep(text: str, policy: pruner_service_pb2.PrunePolicy) -> None:
    """Sets a policy's budget from `1/3`, `0.33` or `33%` (a ratio), or `65` (a count of tokens)."""
    try:
        if text.endswith("%"):
            policy.keep_ratio = float(text[:-1]) / 100
        elif "/" in text:
            above, below = text.split("/")
            policy.keep_ratio = float(above) / float(below)
        elif "." in text or "e" in text.lower():
            policy.keep_ratio = float(text)
        else:
            policy.keep_count = int(text)
    except (ValueError, ZeroDivisionError) as error:
        raise typer.BadParameter(f"{text!r}: expected a ratio (1/3, 0.33, 33%) or a count (65)") from error


def _check_picture(path: Path) -> None:
    """Refuses, before anything is asked, a file that no picture can be written to."""
    if path.suffix.lower() not in {".png", ".jpg", ".jpeg", ".webp"}:
        raise typer.BadParameter(
            f"{path}: expected a name ending in .png, .jpg or .webp", param_hint="--overlay"
        )
    if not os.access(path.parent, os.W_OK):
        raise typer.BadParameter(
            f"{path.parent}: not a folder that can be written to", param_hint="--overlay"
        )
    if importlib.util.find_spec("PIL") is None:
        raise typer.BadParameter("drawing needs Pillow: install hiprune[overlay]", param_hint="--overlay")


def parse_method(text: str) -> pruner_service_pb2.Method.ValueType:
    """The method of a name: none, hiprune, hiprune++, random or strided."""
    if text.lower() not in METHODS:
        raise typer.BadParameter(f"{text!r}: expected one of {', '.join(METHODS)}")
    return METHODS[text.lower()]


@app.command()
def ask(
    image: Annotated[Path, typer.Argument(help="a JPEG, PNG, WebP or GIF file", exists=True, dir_okay=False)],
    question: Annotated[str, typer.Argument(help="what to ask about it")],
    method: Annotated[str, typer.Option(help=", ".join(METHODS))] = "hiprune",
    keep: Annotated[
        str, typer.Option(help="share (1/3, 0.33, 33%) or number (65) of tokens to keep")
    ] = "1/3",
    overlay: Annotated[Path | None, typer.Option(help="write a picture of the kept tokens here")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="longest answer, in tokens", min=1, max=2**31 - 1)
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token")] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
    address: Address = DEFAULT_ADDRESS,
    key: Key = "",
    tls_ca: Authority = "",
    tls_cert: Certificate = "",
    tls_key: CertificateKey = "",
) -> None:
    """Asks a question about an image and streams the answer."""
    policy = pruner_service_pb2.PrunePolicy(method=parse_method(method))
    parse_keep(keep, policy)
    if overlay is not None:
        _check_picture(overlay)
    if not address:
        raise typer.BadParameter("is empty, expected HOST:PORT", param_hint="--address")
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise typer.BadParameter("is not UTF-8", param_hint="QUESTION") from error
    sampling = llm_service_pb2.Sampling(max_tokens=max_tokens, temperature=temperature)
    data = image.read_bytes()
    credentials = _credentials(tls_ca, tls_cert, tls_key)
    if key and credentials is None and not is_private(address):
        err.print("warning: the key goes unencrypted to another machine: give --tls-ca", style="yellow")
    connection = {"address": address, "key": key, "credentials": credentials}
    answer = _run(_stream(connection, question, data, policy, sampling, quiet=as_json))
    report = answer.report.media[0]
    if overlay is not None:
        from hiprune.overlay import draw_overlay

        draw_overlay(data, report.views[0]).save(overlay)
    if as_json:
        content: dict[str, Any] = {
            "answer": answer.text,
            "report": MessageToDict(answer.report),
            "completion": MessageToDict(answer.completion),
        }
        print(json.dumps(content))
        return
    usage = answer.completion.usage
    err.print(
        f"[dim]{report.summary.tokens_before} → {report.summary.tokens_kept} visual tokens, "
        f"cache {CACHE_WORDS[report.cache]}, {usage.completion_tokens} tokens generated"
        + (f", overlay in {overlay}" if overlay else "")
        + "[/dim]"
    )


@app.command()
def up(
    port: Annotated[int, typer.Option(help="port of the llm service on 127.0.0.1", min=0, max=65535)] = 50053,
    model: Model = str(EMBEDDED_MODEL),
    redis: Annotated[bool, typer.Option(help="cache in a private Redis, else in the process")] = True,
    http_port: Annotated[
        int, typer.Option(help="port of the HTTP gateway on 127.0.0.1, where it is installed", max=65535)
    ] = 8080,
) -> None:
    """Runs Redis, the three services and the HTTP gateway on this machine until Ctrl-C."""
    from hiprune.stack import Stack, StackError

    _leave_in_order()
    try:
        with Stack(
            model=model, port=port, redis=redis, progress=lambda step: err.print(f"[dim]{step}[/dim]")
        ) as stack:
            if importlib.util.find_spec("fastapi") and importlib.util.find_spec("uvicorn"):
                gateway = stack.start_gateway(http_port)
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


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="where the overlay picture goes")] = Path("out"),
) -> None:
    """Starts everything, asks the sample questions with three methods, and stops it again."""
    from hiprune.demo import run_demo
    from hiprune.stack import StackError

    _leave_in_order()
    try:
        run_demo(out, folder)
    except (StackError, HipruneError) as error:
        err.print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(1) from error


@app.command(name="export-lm")
def export_lm(
    source: Annotated[Path, typer.Argument(help="directory of a vision-language model")],
    target: Annotated[Path, typer.Argument(help="directory to write; must not be there, or be empty")],
) -> None:
    """Write a model's language part as a checkpoint of its own, for a vLLM server that runs elsewhere."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    from hiprune.checkpoints import CheckpointError
    from hiprune.lm_export import export_language_model

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=err) as bar:
            task = bar.add_task("copying")
            made = export_language_model(
                source, target, lambda done, total: bar.update(task, completed=done, total=total)
            )
    except (CheckpointError, OSError) as error:
        err.print(str(error), style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from error
    out.print(
        f"{target}: {made.tensors} tensors, {made.copied_bytes / 2**20:.1f} MB copied, "
        f"{made.linked_files} files linked"
    )


def _leave_in_order() -> None:
    """Any request to stop ends the stack front to back, once: a second one does not interrupt that."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def leave(number: int, frame: object) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(0)

    for number in numbers:
        signal.signal(number, leave)


async def _stream(
    connection: dict[str, Any],
    question: str,
    image: bytes,
    policy: pruner_service_pb2.PrunePolicy,
    sampling: llm_service_pb2.Sampling,
    *,
    quiet: bool,
) -> Answer:
    """The answer, printed as it comes."""
    async with Client(**connection) as client:
        answer = await client.ask(
            question,
            image,
            policy=policy,
            sampling=sampling,
            on_delta=None if quiet else lambda text: print(text, end="", flush=True),
        )
    if not quiet:
        print()
    return answer


def _credentials(authority: str, certificate: str, key: str) -> grpc.ChannelCredentials | None:
    """TLS as the files say; None where there are none."""
    if not (authority or certificate or key):
        return None
    if bool(certificate) != bool(key):
        missing = "--tls-key" if certificate else "--tls-cert"
        raise typer.BadParameter("is empty, expected a file as its other half is given", param_hint=missing)
    try:
        return Certificates(certificate, key, authority).channel_credentials()
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error


def _run(work: Any) -> Any:
    """Runs a coroutine; a service's error becomes one line and exit code 1."""
    try:
        return asyncio.run(work)
    except HipruneError as error:
        err.print(f"error: {error} ({error.code.name}, {error.reason})", style="red", markup=False)
        raise typer.Exit(1) from error


def main() -> None:
    """Entry point."""
    # gRPC's own log lines are for its developers; errors reach people as HipruneError
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    app()
