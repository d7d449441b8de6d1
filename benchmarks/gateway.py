"""Claims: HTTP adds little to a streamed first token, and 200 streams on one gateway lose no token.

    python -m benchmarks.gateway [--pairs N] [--streams N]

The real services with the included model. The first token of a stream is timed at the client, over HTTP by
OpenAI's API and over gRPC, the same question on pictures that neither has asked about before, in pairs, now
the one first and now the other. Both clients are bare, an HTTP connection and a gRPC channel: what OpenAI's
own client adds in Python is not the gateway's.

Then as many streams at once as were asked for, through one gateway process; every text must be the one that
the same question gets alone over gRPC.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from typing import Any, Final

import httpx2

from benchmarks import plots, report
from benchmarks.cache import photograph
from benchmarks.isolation import interval_of_median
from hiprune.client import Client, question_message
from hiprune.stack import Stack
from hiprune.v1 import llm_service_pb2

CLAIM: Final = (
    "the gateway's streamed first token takes at most 1.10 of the time of the same call over gRPC, and 200 "
    "concurrent streams through one gateway process lose no token"
)
LIMIT: Final = 1.10
QUESTION: Final = "which colour is the circle ?"
MODEL: Final = "llava"
SIDE: Final = 336
MAX_TOKENS: Final = 16
TIMEOUT_S: Final = 300.0


def body_of(image: bytes) -> bytes:
    """A streamed chat request about an image."""
    url = f"data:image/jpeg;base64,{base64.b64encode(image).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    content = {
        "model": MODEL,
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": MAX_TOKENS,
        "stream": True,
    }
    return json.dumps(content).encode()


async def over_http(http: httpx2.AsyncClient, image: bytes) -> tuple[float, float, str]:
    """Seconds to the first token and to the end, and the text. What is sent is made within that time."""
    begun = time.perf_counter()
    first, text = 0.0, ""
    headers = {"content-type": "application/json", "x-request-timeout": f"{TIMEOUT_S:g}"}
    async with http.stream("POST", "/v1/chat/completions", content=body_of(image), headers=headers) as answer:
        answer.raise_for_status()
        done = False
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                done = True
            elif line.startswith("data: "):
                content = json.loads(line.removeprefix("data: "))
                if "error" in content:
                    raise SystemExit(f"an error in the stream: {content}")
                if words := content["choices"][0]["delta"].get("content"):
                    first = first or time.perf_counter() - begun
                    text += words
        if not done:
            raise SystemExit("a stream ended before its end")
    return first, time.perf_counter() - begun, text


async def over_grpc(client: Client, image: bytes) -> tuple[float, float, str]:
    """The same over gRPC."""
    begun = time.perf_counter()
    first, text = 0.0, ""
    request = llm_service_pb2.AskImageRequest(
        messages=[question_message(QUESTION, [image])],
        sampling=llm_service_pb2.Sampling(max_tokens=MAX_TOKENS),
        model=MODEL,
    )
    async for event in client.ask_stream(request):
        if event.WhichOneof("event") == "delta":
            first = first or time.perf_counter() - begun
            text += event.delta.text
    return first, time.perf_counter() - begun, text


async def measure_pairs(http: httpx2.AsyncClient, client: Client, count: int, warm_up: int) -> dict[str, Any]:
    """First tokens over both, in pairs."""
    times: tuple[list[float], list[float]] = ([], [])
    with report.progress("first tokens", count + warm_up) as step:
        for number in range(count + warm_up):
            # two pictures, as the second to ask about one would find it in the cache
            pictures = [photograph(2 * number + which, SIDE) for which in (0, 1)]
            for which in (0, 1) if number % 2 == 0 else (1, 0):
                ask = over_http(http, pictures[which]) if which == 0 else over_grpc(client, pictures[which])
                first, _, _ = await ask
                if number >= warm_up:
                    times[which].append(first)
            step()
    ratios = [a / b for a, b in zip(*times, strict=True)]
    low, high = interval_of_median(ratios)
    added = [1000 * (a - b) for a, b in zip(*times, strict=True)]
    return {
        "http_ms": report.spread([1000 * each for each in times[0]]),
        "grpc_ms": report.spread([1000 * each for each in times[1]]),
        "ratio": {**report.spread(ratios), "interval": [low, high]},
        "added_ms": report.spread(added),
    }


async def measure_streams(http: httpx2.AsyncClient, client: Client, count: int) -> dict[str, Any]:
    """So many streams at once, and what came of each."""
    few = [photograph(number, SIDE) for number in range(8)]
    pictures = [few[number % len(few)] for number in range(count)]
    expected = {image: (await over_grpc(client, image))[2] for image in few}
    begun = time.perf_counter()
    found = await asyncio.gather(*(over_http(http, image) for image in pictures))
    taken = time.perf_counter() - begun
    wrong = sum(text != expected[image] for image, (_, _, text) in zip(pictures, found, strict=True))
    return {
        "streams": count,
        "with_another_text": wrong,
        "first_ms": report.spread([1000 * first for first, _, _ in found]),
        "end_ms": report.spread([1000 * end for _, end, _ in found]),
        "all_s": taken,
    }


async def measure(address: str, gateway: str, options: Any) -> dict[str, Any]:
    """All figures."""
    limits = httpx2.Limits(max_connections=options.streams)
    async with (
        Client(address, timeout_s=TIMEOUT_S) as client,
        httpx2.AsyncClient(
            base_url=f"http://{gateway}", limits=limits, timeout=TIMEOUT_S, trust_env=False
        ) as http,
    ):
        pairs = await measure_pairs(http, client, options.pairs, options.warm_up)
        return {"first_token": pairs, "concurrent": await measure_streams(http, client, options.streams)}


def main() -> None:
    """Measures, prints and writes."""
    parser = report.parser(__doc__)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--warm-up", type=int, default=10)
    parser.add_argument("--streams", type=int, default=200)
    options = parser.parse_args()
    environ = {
        "HIPRUNE_ENCODER_DEVICE": options.device,
        "HIPRUNE_LLM_DEVICE": options.device,
        "HIPRUNE_LLM_MAX_QUEUE": str(2 * options.streams),
    }
    with Stack(environ=environ) as stack:
        results = asyncio.run(measure(stack.address, stack.start_gateway(), options))
    first, concurrent = results["first_token"], results["concurrent"]
    low, high = first["ratio"]["interval"]
    targets = [
        report.target("first token, HTTP / gRPC", first["ratio"]["median"], LIMIT),
        report.target("streams with another text", float(concurrent["with_another_text"]), 0.0),
    ]
    report.table(
        "The first token of a stream",
        ("", "median ms"),
        [
            ("over HTTP", report.short(first["http_ms"]["median"])),
            ("over gRPC", report.short(first["grpc_ms"]["median"])),
            ("added", report.short(first["added_ms"]["median"])),
            ("ratio", f"{first['ratio']['median']:.3f} ({low:.3f} to {high:.3f})"),
            (f"{concurrent['streams']} at once: first", report.short(concurrent["first_ms"]["median"])),
            ("all of them, s", report.short(concurrent["all_s"])),
        ],
    )
    report.print_targets(targets)
    name = report.name_on("gateway", options.device)
    bars = {"over gRPC": first["grpc_ms"]["median"], "over HTTP": first["http_ms"]["median"]}
    plots.plot(name, [plots.Panel(x="first token, ms", bars=bars, title=f"× {first['ratio']['median']:.3f}")])
    settings = {
        "model": "the included one",
        "pairs": options.pairs,
        "warm_up": options.warm_up,
        "streams": options.streams,
        "side": SIDE,
        "max_tokens": MAX_TOKENS,
    }
    print(report.write(name, CLAIM, settings, results, device=options.device, targets=targets))


if __name__ == "__main__":
    main()
