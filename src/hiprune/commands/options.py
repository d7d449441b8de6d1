"""What the commands have in common: options, their checks, how they connect, and how they end.

A command ends with 0; with 1 and one line of why when a service refuses or something is not as it should be;
with 2 when it was called wrongly; with 130 for Ctrl-C. With `--json`, the one line is an object on standard
error, `{"error": {"message", "reason", "field", "code", "retry_after_s"}}`, and standard output holds what
was asked for or nothing.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn, TypeVar

import grpc
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hiprune.auth import is_private
from hiprune.client import DEFAULT_ADDRESS, Client
from hiprune.config import ConfigError
from hiprune.errors import HipruneError, InvalidInput
from hiprune.policies import METHODS, method_of, set_keep
from hiprune.trust import Certificates
from hiprune.v1 import pruner_service_pb2

out = Console()
err = Console(stderr=True)

PICTURES: Final = (".png", ".jpg", ".jpeg", ".webp")
_IN_THE_CLEAR: Final = "the key goes unencrypted to another machine: give --tls-ca"
_KEEPS: Final = ("1/2", "1/3", "1/4", "22%", "11%", "64")

Result = TypeVar("Result")


# --- options -----------------------------------------------------------------------------------------------


def complete_method(incomplete: str) -> list[str]:
    """Methods that begin so, for the shell."""
    return [name for name in METHODS if name.startswith(incomplete.lower())]


def complete_keep(incomplete: str) -> list[str]:
    """Budgets that people choose, for the shell."""
    return [each for each in _KEEPS if each.startswith(incomplete)]


Address = Annotated[
    str, typer.Option(envvar="HIPRUNE_ADDRESS", help="the llm, HOST:PORT or unix:PATH", show_envvar=True)
]
PrunerAddress = Annotated[
    str,
    typer.Option("--pruner", envvar="HIPRUNE_PRUNER_ADDRESS", help="the pruner, HOST:PORT or unix:PATH"),
]
EncoderAddress = Annotated[
    str,
    typer.Option("--encoder", envvar="HIPRUNE_ENCODER_ADDRESS", help="the encoder, HOST:PORT or unix:PATH"),
]
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
Timeout = Annotated[float, typer.Option(help="seconds after which a request is given up", min=0.001)]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object")]
Images = Annotated[
    list[Path], typer.Argument(help="JPEG, PNG, WebP or GIF files", exists=True, dir_okay=False)
]
Method = Annotated[str, typer.Option(help=", ".join(METHODS), autocompletion=complete_method)]
Keep = Annotated[
    str,
    typer.Option(
        help="share (1/3, 0.33, 33%) or number (65) of tokens to keep", autocompletion=complete_keep
    ),
]
Question = Annotated[str, typer.Option(help="what is asked: HiPrune++ keeps tokens that it is about")]


def policy_of(
    method: str, keep: str, method_hint: str = "--method", keep_hint: str = "--keep"
) -> pruner_service_pb2.PrunePolicy:
    """The policy of two options. Raises BadParameter naming the one that is wrong."""
    made = pruner_service_pb2.PrunePolicy()
    try:
        made.method = method_of(method)
    except InvalidInput as error:
        raise typer.BadParameter(error.message, param_hint=method_hint) from error
    try:
        set_keep(made, keep)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=keep_hint) from error
    return made


def check_words(question: str, hint: str) -> None:
    """Refuses, before anything is asked, what no message can hold."""
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise typer.BadParameter("is not UTF-8", param_hint=hint) from error


def check_picture(path: Path, hint: str) -> None:
    """Refuses, before anything is asked, a file that no picture can be written to."""
    if path.suffix.lower() not in PICTURES:
        raise typer.BadParameter(f"{path}: expected a name ending in .png, .jpg or .webp", param_hint=hint)
    check_file(path, hint)
    check_pillow(hint)


def check_file(path: Path, hint: str) -> None:
    """Refuses a file that cannot be written."""
    if path.is_dir():
        raise typer.BadParameter(f"{path}: is a folder, expected a file", param_hint=hint)
    if path.exists() and not os.access(path, os.W_OK):
        raise typer.BadParameter(f"{path}: cannot be written to", param_hint=hint)
    check_writable(path.parent, hint)


def check_writable(folder: Path, hint: str) -> None:
    """Refuses a folder that nothing can be written to."""
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise typer.BadParameter(f"{folder}: not a folder that can be written to", param_hint=hint)


def check_pillow(hint: str) -> None:
    """Refuses to draw where nothing can be drawn with."""
    if importlib.util.find_spec("PIL") is None:
        raise typer.BadParameter("drawing needs Pillow: install hiprune[overlay]", param_hint=hint)


# --- the services ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Connection:
    """Where the services are, and as whom they are called."""

    address: str = DEFAULT_ADDRESS
    pruner: str = ""
    encoder: str = ""
    key: str = field(default="", repr=False)
    credentials: grpc.ChannelCredentials | None = None
    timeout_s: float = 60.0

    @classmethod
    def of(
        cls,
        *,
        key: str,
        tls: tuple[str, str, str],
        address: str = "",
        pruner: str = "",
        encoder: str = "",
        timeout_s: float = 60.0,
        as_json: bool = False,
    ) -> Connection:
        """Of the options; `tls` is authority, certificate and key. Raises BadParameter.

        Warns of a key in the clear, but not with `as_json`: then standard error holds an object or nothing.
        """
        credentials = _credentials(*tls)
        for each in (address, pruner, encoder):
            if key and each and credentials is None and not is_private(each) and not as_json:
                err.print(f"warning: {_IN_THE_CLEAR}", style="yellow")
                break
        return cls(address, pruner, encoder, key, credentials, timeout_s)

    def client(self) -> Client:
        """A client of the services. Raises HipruneError for a key that cannot be sent."""
        return Client(
            self.address,
            pruner=self.pruner,
            encoder=self.encoder,
            key=self.key,
            credentials=self.credentials,
            timeout_s=self.timeout_s,
        )


def required(address: str, hint: str) -> str:
    """An address that is one. Raises BadParameter."""
    if not address:
        raise typer.BadParameter("is empty, expected HOST:PORT", param_hint=hint)
    return address


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


# --- how a command ends ------------------------------------------------------------------------------------


def run(work: Coroutine[Any, Any, Result], *, as_json: bool) -> Result:
    """Runs a coroutine; a service's error becomes one line and exit code 1."""
    try:
        return asyncio.run(work)
    except HipruneError as error:
        fail(error, as_json=as_json)


def fail(error: HipruneError, *, as_json: bool) -> NoReturn:
    """Ends the command with a service's error: one line, or one object."""
    if as_json:
        print_error(
            str(error),
            reason=error.reason,
            field=error.field,
            code=error.code.name,
            retry_after_s=error.retry_after_s,
        )
    else:
        again = f"; try again in {error.retry_after_s:g} s" if error.retry_after_s is not None else ""
        err.print(f"error: {error} ({error.code.name}, {error.reason}){again}", style="red", markup=False)
    raise typer.Exit(1) from error


@contextmanager
def writing(path: Path, *, as_json: bool) -> Iterator[None]:
    """Ends the command where a file cannot be written after all: a full disk, for example."""
    try:
        yield
    except OSError as error:
        raise stop(f"{path}: {error.strerror or error}", reason="NOT_WRITTEN", as_json=as_json) from error


def stop(message: str, *, reason: str, as_json: bool) -> typer.Exit:
    """What ends the command with 1, once it has been said why: in one line, or in one object."""
    if as_json:
        print_error(message, reason=reason)
    else:
        err.print(f"error: {message}", style="red", markup=False, soft_wrap=True)
    return typer.Exit(1)


def print_error(
    message: str, *, reason: str, field: str = "", code: str = "", retry_after_s: float | None = None
) -> None:
    """An error as one JSON object on standard error."""
    content = {
        "message": message,
        "reason": reason,
        "field": field,
        "code": code,
        "retry_after_s": retry_after_s,
    }
    err.file.write(json.dumps({"error": content}, ensure_ascii=False) + "\n")


def print_json(content: dict[str, Any]) -> None:
    """One JSON object on standard output."""
    print(json.dumps(content, ensure_ascii=False))


def wants_json(arguments: Sequence[str]) -> bool:
    """Whether a command line asks for JSON."""
    return "--json" in arguments


# --- progress ----------------------------------------------------------------------------------------------


def progress() -> Progress:
    """A bar on standard error that leaves nothing behind; silent where nobody watches."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=err, transient=True, disable=not err.is_terminal)
