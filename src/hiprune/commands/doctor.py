"""`hiprune doctor`: looks at settings, services, Redis, GPU and files, and says what to do."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Mapping
from typing import Annotated

import typer

from hiprune import auth, checks, reach
from hiprune.checks import Finding
from hiprune.client import DEFAULT_ADDRESS, DEFAULT_ENCODER_ADDRESS, DEFAULT_PRUNER_ADDRESS
from hiprune.commands import options
from hiprune.commands.options import AsJson, Authority, Certificate, CertificateKey, Connection, Key, err, out
from hiprune.reach import Place

_GATEWAY = "127.0.0.1:8080"
_COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}


def doctor(
    address: Annotated[
        str, typer.Option("--llm", "--address", envvar="HIPRUNE_ADDRESS", help="the llm", show_default=False)
    ] = "",
    pruner: Annotated[
        str, typer.Option(envvar="HIPRUNE_PRUNER_ADDRESS", help="the pruner", show_default=False)
    ] = "",
    encoder: Annotated[
        str, typer.Option(envvar="HIPRUNE_ENCODER_ADDRESS", help="the encoder", show_default=False)
    ] = "",
    gateway: Annotated[
        str,
        typer.Option(
            envvar="HIPRUNE_GATEWAY_ADDRESS",
            help="the gateway, HOST:PORT or https://HOST:PORT",
            show_default=False,
        ),
    ] = "",
    as_json: AsJson = False,
    key: Key = "",
    tls_ca: Authority = "",
    tls_cert: Certificate = "",
    tls_key: CertificateKey = "",
) -> None:
    """Says what is wrong here, and what to do. Ends with 1 when there is a problem.

    Services that are not named are looked for where `hiprune up` puts them.
    """
    places = [
        Place("llm", address or DEFAULT_ADDRESS, bool(address)),
        Place("pruner", pruner or DEFAULT_PRUNER_ADDRESS, bool(pruner)),
        Place("encoder", encoder or DEFAULT_ENCODER_ADDRESS, bool(encoder)),
    ]
    http = Place("gateway", gateway or _GATEWAY, bool(gateway))
    try:
        connection = Connection.of(
            address=places[0].address, key=key, tls=(tls_ca, tls_cert, tls_key), as_json=as_json
        )
    except typer.BadParameter:  # which a finding says; a key meant for TLS does not go without
        connection = Connection(places[0].address)
    files = {"HIPRUNE_TLS_CA": tls_ca, "HIPRUNE_TLS_CERT": tls_cert, "HIPRUNE_TLS_KEY": tls_key}
    with err.status("looking"):
        findings = _look(places, http, connection, key, {**os.environ, **files})
    count = Counter(each.status for each in findings)
    if as_json:
        options.print_json({"ok": not count["problem"], "findings": [each.content() for each in findings]})
    else:
        for each in findings:
            colour = _COLOURS[each.status]
            out.print(f"[{colour}]{each.status:<8}[/{colour}] ", end="")
            out.print(f"{each.check}: {each.message}", markup=False, highlight=False, soft_wrap=True)
            if each.advice:
                out.print(f"         → {each.advice}", markup=False, highlight=False, soft_wrap=True)
        out.print(f"{count['problem']} problems, {count['warning']} warnings", highlight=False)
    if count["problem"]:
        raise typer.Exit(1)


def _look(
    places: list[Place], http: Place, connection: Connection, key: str, environ: Mapping[str, str]
) -> list[Finding]:
    """Everything, this machine first. `key` is the one given, the connection's the one to send."""
    sent = connection.key if auth.can_be_sent(connection.key) else ""
    services = reach.check_services(places, connection.credentials, sent)
    return [
        *checks.check_python(),
        *checks.check_settings(environ),
        *checks.check_key(key),
        *checks.check_tls(environ),
        *asyncio.run(services),
        *reach.check_gateway(http, environ.get("HIPRUNE_TLS_CA", "")),
        *asyncio.run(reach.check_redis(environ)),
        *checks.check_gpu(),
        *checks.check_shared_memory(environ),
    ]
