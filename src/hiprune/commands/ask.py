"""`hiprune ask`: a question about an image, the answer streamed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from google.protobuf.json_format import MessageToDict

from hiprune.client import DEFAULT_ADDRESS
from hiprune.commands import options
from hiprune.commands.options import (
    Address,
    AsJson,
    Authority,
    Certificate,
    CertificateKey,
    Connection,
    Keep,
    Key,
    Method,
    Timeout,
    err,
)
from hiprune.results import Answer
from hiprune.v1 import llm_service_pb2, pruner_service_pb2


def ask(
    image: Annotated[Path, typer.Argument(help="a JPEG, PNG, WebP or GIF file", exists=True, dir_okay=False)],
    question: Annotated[str, typer.Argument(help="what to ask about it")],
    method: Method = "hiprune",
    keep: Keep = "1/3",
    overlay: Annotated[Path | None, typer.Option(help="write a picture of the kept tokens here")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="longest answer, in tokens", min=1, max=2**31 - 1)
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token")] = 0.0,
    as_json: AsJson = False,
    address: Address = DEFAULT_ADDRESS,
    key: Key = "",
    tls_ca: Authority = "",
    tls_cert: Certificate = "",
    tls_key: CertificateKey = "",
    timeout: Timeout = 60.0,
) -> None:
    """Asks a question about an image and streams the answer."""
    policy = options.policy_of(method, keep)
    if overlay is not None:
        options.check_picture(overlay, "--overlay")
    options.check_words(question, "QUESTION")
    connection = Connection.of(
        address=options.required(address, "--address"),
        key=key,
        tls=(tls_ca, tls_cert, tls_key),
        timeout_s=timeout,
        as_json=as_json,
    )
    sampling = llm_service_pb2.Sampling(max_tokens=max_tokens, temperature=temperature)
    data = image.read_bytes()
    work = _stream(connection, question, data, policy, sampling, quiet=as_json)
    answer = options.run(work, as_json=as_json)
    (kept,) = answer.media
    if overlay is not None:
        from hiprune.overlay import draw_overlay

        drawn = draw_overlay(data, kept.views[0].selection, tiled=kept.is_tiled, views=len(kept.views))
        with options.writing(overlay, as_json=as_json):
            drawn.save(overlay)
    if as_json:
        options.print_json(
            {
                "answer": answer.text,
                "report": MessageToDict(answer.report),
                "completion": MessageToDict(answer.completion),
                "first_text_s": round(answer.first_text_s, 6),
                "total_s": round(answer.total_s, 6),
            }
        )
        return
    err.print(
        f"[dim]{kept.tokens_before} → {kept.tokens_kept} visual tokens, cache {kept.cache}, "
        f"{answer.completion.usage.completion_tokens} tokens generated"
        + (f", overlay in {overlay}" if overlay else "")
        + "[/dim]"
    )


async def _stream(
    connection: Connection,
    question: str,
    image: bytes,
    policy: pruner_service_pb2.PrunePolicy,
    sampling: llm_service_pb2.Sampling,
    *,
    quiet: bool,
) -> Answer:
    """The answer, printed as it comes; until then, where somebody watches, that it is waited for."""
    waiting = err.status("waiting for the first word")

    def show(text: str) -> None:
        waiting.stop()
        if not quiet:
            print(text, end="", flush=True)

    with waiting:
        async with connection.client() as client:
            answer = await client.ask(question, image, policy=policy, sampling=sampling, on_delta=show)
    if not quiet:
        print()
    return answer
