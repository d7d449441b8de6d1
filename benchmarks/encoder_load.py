"""Claim: the encoder service keeps up with its own tower, and under overload refuses and loses nothing.

    python -m benchmarks.encoder_load [--device cuda] [--clients 32] [--images 32]

- Closed loop: the real encoder process on a Unix socket with a tower of CLIP-L/14-336's size and 32 clients,
  each of whom sends its next image when it has its answer; in turn with one loop over the same files that
  decodes and encodes them in batches of the best size.
- Open loop: requests at random moments (Poisson) at a quarter to twice what saturates the service, with a
  tower of CLIP-B/32's size, which answers often enough for percentiles. Latency counts from the moment when
  a request was due. Every request must end in an answer or in RESOURCE_EXHAUSTED with a time to retry.

Every answer is held against the same image encoded alone.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
import numpy as np
import torch

from benchmarks import checkpoints, plots, report
from hiprune import tensors
from hiprune.calls import connect
from hiprune.checkpoints import open_checkpoint
from hiprune.errors import Exhausted, from_rpc
from hiprune.stack import Stack
from hiprune.v1 import encoder_service_pb2, encoder_service_pb2_grpc, media_pb2
from services.encoder.families import EncodedView, load_tower
from services.encoder.images import ImageLimits, decode_image

CLAIM: Final = (
    "32 clients get at least 0.9 of one offline loop's throughput; under overload every request ends in a "
    "right answer or in a refusal that says when to retry"
)
LIMITS: Final = ImageLimits(max_bytes=2**24, max_pixels=2**26, max_side=2**14)
IMAGES: Final = 8
TOLERANCE: Final = {"cpu": 1e-3, "cuda": 5e-2}
"""Largest difference of any number from the reference, relative to the reference's largest: a batch sums in
another order than one image alone, and bf16 keeps eight bits of it."""
TIMEOUT_S: Final = 600.0


# --- the files, and what their answers should be ---------------------------------------------------------


class Offline:
    """The encoder's tower in this process, without a service: references, and the best loop."""

    def __init__(self, path: Path, device: str) -> None:
        checkpoint = open_checkpoint(str(path))
        self.layers = sorted({checkpoint.facts.object_layer, checkpoint.facts.deep_layer})
        self.patches = checkpoint.facts.fixed_tokens or 0
        self.files = [path.read_bytes() for path in sorted(checkpoints.SAMPLES.glob("*.png"))[:IMAGES]]
        self._tower = load_tower(checkpoint, None, torch.device(device), report.dtype_on(device))
        self._tower.warm_up(self.layers)
        self._device = device
        self.references = [self.encode([file])[0] for file in self.files]

    def encode(self, files: list[bytes]) -> list[EncodedView]:
        """Decodes, prepares and encodes in one batch."""
        items = [self._tower.prepare(decode_image(each, limits=LIMITS, field="image")) for each in files]
        return [view for (view,) in self._tower.encode(items, self.layers, [False] * len(items))]

    def images_per_s(self, batch: int, images: int) -> float:
        """Throughput of a loop over the files in batches of one size."""
        count = max(1, images // batch)
        queue = [self.files[number % len(self.files)] for number in range(count * batch)]

        def work() -> None:
            for start in range(0, len(queue), batch):
                self.encode(queue[start : start + batch])

        return count * batch / report.seconds(work, self._device)

    def smallest_difference(self) -> float:
        """How far apart the two references that are most alike are: a wrong answer is at least that wrong."""
        return min(
            _difference(one.features, other.features)
            for place, one in enumerate(self.references)
            for other in self.references[:place]
        )


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max())


@dataclass
class Tally:
    """What became of the requests."""

    outcomes: Counter[str] = field(default_factory=Counter)
    latencies_ms: list[float] = field(default_factory=list)
    worst_difference: float = 0.0

    def add(self, other: Tally) -> None:
        """Counts what became of others too."""
        self.outcomes += other.outcomes
        self.latencies_ms += other.latencies_ms
        self.worst_difference = max(self.worst_difference, other.worst_difference)

    def lost(self) -> int:
        """Requests that ended in neither a right answer nor a proper refusal."""
        return sum(count for what, count in self.outcomes.items() if what not in {"answered", "refused"})


async def ask(stub: Any, offline: Offline, which: int, due_s: float, tally: Tally, tolerance: float) -> None:
    """One request, from the moment it was due to its end."""
    request = encoder_service_pb2.EncodeImageRequest(
        media=media_pb2.Media(image=offline.files[which]), layers=offline.layers
    )
    try:
        answer = await stub.EncodeImage(request, timeout=TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        found = from_rpc(error, peer="encoder")
        proper = isinstance(found, Exhausted) and found.retry_after_s is not None
        tally.outcomes["refused" if proper else f"failed: {error.code().name}"] += 1
        return
    tally.latencies_ms.append(1000 * (time.perf_counter() - due_s))
    if any({entry.layer for entry in view.attention} != set(offline.layers) for view in answer.views):
        tally.outcomes["wrong"] += 1
        return
    # on a thread: the comparison must not hold up the clients
    worst = await asyncio.to_thread(_worst_difference, answer, offline.references[which])
    tally.worst_difference = max(tally.worst_difference, worst)
    tally.outcomes["answered" if worst <= tolerance else "wrong"] += 1


def _worst_difference(answer: encoder_service_pb2.EncodeImageResponse, reference: EncodedView) -> float:
    """How far an answer's features and scores are from the reference's."""
    (view,) = answer.views
    features = tensors.from_proto(view.features, field="features", shape=tuple(reference.features.shape))
    worst = _difference(features, reference.features)
    for entry in view.attention:
        expected = reference.scores[entry.layer]
        scores = tensors.from_proto(entry.scores, field="scores", shape=tuple(expected.shape))
        worst = max(worst, _difference(scores, expected))
    return worst


@contextmanager
def encoder(model: Path, environ: Mapping[str, str]) -> Iterator[str]:
    """The encoder's address while it runs."""
    stack = Stack(model=str(model), redis=False, environ=environ)
    try:
        stack.start_service("encoder")
        stack.wait_ready("encoder")
        yield stack.encoder_address
    finally:
        stack.stop()


# --- closed loop -----------------------------------------------------------------------------------------


async def closed_loop(
    address: str, offline: Offline, clients: int, images: int, tolerance: float
) -> tuple[float, Tally]:
    """Answers a second to `clients` who together ask `images` times, and what became of every request."""
    tally = Tally()
    async with connect(address) as channel:
        stub = encoder_service_pb2_grpc.EncoderServiceStub(channel)
        queue = iter(range(images))
        with report.progress(f"{clients} clients", images) as step:

            async def client() -> None:
                for number in queue:
                    await ask(stub, offline, number % IMAGES, time.perf_counter(), tally, tolerance)
                    step()

            begun = time.perf_counter()
            await asyncio.gather(*(client() for _ in range(clients)))
            taken = time.perf_counter() - begun
    return tally.outcomes["answered"] / taken, tally


def measure_throughput(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The offline loop by batch size; then its best and the service, in turn."""
    device = options.device
    offline = Offline(model, device)
    sweep = {
        batch: offline.images_per_s(batch, max(batch, options.offline_images // 2))
        for batch in report.track(options.batches, "offline loop, by batch size")
    }
    best = max(sweep, key=lambda batch: sweep[batch])
    environ = {"HIPRUNE_ENCODER_PAIRED_MODEL": "none", "HIPRUNE_ENCODER_DEVICE": device}
    if options.service_batch:
        environ["HIPRUNE_ENCODER_MAX_BATCH_PATCHES"] = str(options.service_batch * offline.patches)
    whole = Tally()
    with encoder(model, environ) as address:

        def serve(images: int) -> float:
            served, tally = asyncio.run(
                closed_loop(address, offline, options.clients, images, TOLERANCE[device])
            )
            whole.add(tally)
            return served

        serve(options.clients)  # so that each of them has had an answer
        whole.latencies_ms.clear()
        served, alone = report.pairs(
            lambda: serve(options.images),
            lambda: offline.images_per_s(best, options.offline_images),
            count=options.rounds,
            warm_up=0,
        )
    return {
        "tower": "CLIP-L/14-336",
        "offline_images_per_s": {str(batch): value for batch, value in sweep.items()},
        "best_batch": best,
        "best_offline_images_per_s": report.spread(alone),
        "service_images_per_s": report.spread(served),
        "ratio": report.ratios(served, alone),
        "latency_ms": percentiles(whole.latencies_ms),
        "outcomes": dict(whole.outcomes),
        "lost": whole.lost(),
        "worst_difference": whole.worst_difference,
        "least_difference_of_two_images": offline.smallest_difference(),
    }


# --- open loop -------------------------------------------------------------------------------------------


async def open_loop(
    address: str, offline: Offline, rate: float, seconds: float, seed: int, tolerance: float
) -> dict[str, Any]:
    """Requests at `rate` a second on average, for `seconds`, whatever becomes of them."""
    draw = random.Random(seed)
    tally = Tally()
    async with connect(address) as channel:
        stub = encoder_service_pb2_grpc.EncoderServiceStub(channel)
        tasks: list[asyncio.Task[None]] = []
        begun = due = time.perf_counter()
        while (due := due + draw.expovariate(rate)) < begun + seconds:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            which = draw.randrange(IMAGES)
            tasks.append(asyncio.create_task(ask(stub, offline, which, due, tally, tolerance)))
        await asyncio.gather(*tasks)
        taken = time.perf_counter() - begun
    return {
        "offered_per_s": rate,
        "sent": len(tasks),
        "answered_per_s": tally.outcomes["answered"] / taken,
        "outcomes": dict(tally.outcomes),
        "lost": len(tasks) - sum(tally.outcomes.values()) + tally.lost(),
        "latency_ms": percentiles(tally.latencies_ms),
        "worst_difference": tally.worst_difference,
    }


def measure_load(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Saturation by a closed loop, then each load."""
    device = options.device
    offline = Offline(model, device)
    environ = {
        "HIPRUNE_ENCODER_PAIRED_MODEL": "none",
        "HIPRUNE_ENCODER_DEVICE": device,
        # room for a few batches, so that twice the load that saturates is refused within the run
        "HIPRUNE_ENCODER_MAX_BATCH_PATCHES": str(8 * offline.patches),
        "HIPRUNE_ENCODER_MAX_QUEUE_PATCHES": str(options.queue * offline.patches),
    }
    rows = []
    with encoder(model, environ) as address:
        saturation, tally = asyncio.run(
            closed_loop(
                address, offline, min(32, options.queue), options.saturation_images, TOLERANCE[device]
            )
        )
        for number, load in enumerate(report.track(options.loads, "offered load")):
            row = asyncio.run(
                open_loop(address, offline, load * saturation, options.seconds, number, TOLERANCE[device])
            )
            rows.append({"load": load, **row})
    return {
        "tower": "CLIP-B/32",
        "saturation_images_per_s": saturation,
        "saturation": {"outcomes": dict(tally.outcomes), "lost": tally.lost()},
        "queue_images": options.queue,
        "loads": rows,
        "least_difference_of_two_images": offline.smallest_difference(),
    }


def percentiles(values: list[float]) -> dict[str, float]:
    """p50, p95 and p99, and how many they are of; nothing of nothing."""
    if not values:
        return {"n": 0}
    found = np.percentile(values, (50, 95, 99))
    return {"p50": float(found[0]), "p95": float(found[1]), "p99": float(found[2]), "n": len(values)}


# --- the answer ------------------------------------------------------------------------------------------


def targets_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What the claim is held to."""
    closed, loads = results["closed_loop"], results["open_loop"]["loads"]
    lost = closed["lost"] + results["open_loop"]["saturation"]["lost"] + sum(row["lost"] for row in loads)
    refused = sum(row["outcomes"].get("refused", 0) for row in loads)
    worst = max(closed["worst_difference"], *(row["worst_difference"] for row in loads))
    apart = min(results[loop]["least_difference_of_two_images"] for loop in ("closed_loop", "open_loop"))
    return [
        report.target(
            "service / best offline loop, images a second", closed["ratio"]["median"], 0.9, least=True
        ),
        report.target("requests lost, failed or wrong", lost, 0),
        report.target("requests refused with a time to retry", refused, 1, least=True),
        report.target("answers' error / difference of two images", worst / apart, 0.1),
    ]


def show(results: dict[str, Any], name: str) -> None:
    """The tables and the plot."""
    closed, load = results["closed_loop"], results["open_loop"]
    in_turn = closed["best_offline_images_per_s"]["median"]
    report.table(
        f"{closed['tower']}, images a second: service × {closed['ratio']['median']:.2f} of offline",
        ("", "images/s"),
        [
            *((f"offline, batch {batch}", value) for batch, value in closed["offline_images_per_s"].items()),
            (f"offline, batch {closed['best_batch']}, in turn", in_turn),
            ("service, in turn", closed["service_images_per_s"]["median"]),
        ],
    )
    ranks = ("p50", "p95", "p99")
    report.table(
        f"{load['tower']}, saturated at {load['saturation_images_per_s']:.1f} images/s",
        ("load", "sent", "answered", "refused", "lost", "per s", "p50 ms", "p95 ms", "p99 ms"),
        [
            (
                row["load"],
                row["sent"],
                row["outcomes"].get("answered", 0),
                row["outcomes"].get("refused", 0),
                row["lost"],
                row["answered_per_s"],
                *(row["latency_ms"].get(rank, "–") for rank in ranks),
            )
            for row in load["loads"]
        ],
    )
    ticks = [row["load"] for row in load["loads"]]
    lines = {
        rank: [(row["load"], row["latency_ms"][rank]) for row in load["loads"] if rank in row["latency_ms"]]
        for rank in ranks
    }
    shares = {
        word: [
            (row["load"], (row["lost"] if word == "lost" else row["outcomes"].get(word, 0)) / row["sent"])
            for row in load["loads"]
            if row["sent"]
        ]
        for word in ("answered", "refused", "lost")
    }
    x = "offered load, × saturation"
    panels = [
        plots.Panel(x=x, y="latency, ms", lines=lines, log_y=True, ticks=ticks, title="latency of answers"),
        plots.Panel(x=x, y="share of requests", lines=shares, ticks=ticks, title="outcomes"),
    ]
    plots.plot(name, panels)


def main() -> None:
    """Measures, prints and writes."""
    parser = report.parser(__doc__)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument(
        "--images", type=int, help="that the clients send in a round; default: 32, on cuda 512"
    )
    parser.add_argument("--rounds", type=int, default=5, help="of the service and the offline loop, in turn")
    parser.add_argument("--offline-images", type=int, help="in an offline loop; default: 12, on cuda 512")
    parser.add_argument("--batches", type=int, nargs="+", help="default: 1 2 4 8, on cuda to 28")
    parser.add_argument(
        "--service-batch", type=int, help="images in the service's batches; default: its own setting"
    )
    parser.add_argument("--queue", type=int, default=32, help="images that may wait, in the open loop")
    parser.add_argument(
        "--saturation-images", type=int, help="that find out the saturation; default: 256, on cuda 4096"
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="of each load")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.25, 0.5, 0.75, 1.0, 1.5, 2.0])
    options = parser.parse_args()
    on_cpu = options.device == "cpu"
    options.images = options.images or (32 if on_cpu else 512)
    options.offline_images = options.offline_images or (12 if on_cpu else 512)
    options.saturation_images = options.saturation_images or (256 if on_cpu else 4096)
    options.batches = options.batches or ([1, 2, 4, 8] if on_cpu else [1, 2, 4, 8, 16, 28])
    results = {}
    with checkpoints.temporary() as folder:
        for loop, vision, measure in (
            ("closed_loop", checkpoints.CLIP_L_336, measure_throughput),
            ("open_loop", checkpoints.CLIP_B_32, measure_load),
        ):
            config = checkpoints.llava(vision, checkpoints.qwen2_0_5b())
            model = checkpoints.write_llava(folder / loop / "llava", config, vision_only=True)
            results[loop] = measure(model, options)
    name = report.name_on("encoder_load", options.device)
    targets = targets_of(results)
    show(results, name)
    report.print_targets(targets)
    settings = {
        "dtype": str(report.dtype_on(options.device)).removeprefix("torch."),
        "layers_captured": 2,
        "tolerance": TOLERANCE[options.device],
        "images_differing": IMAGES,
        **{key: value for key, value in vars(options).items() if key != "device"},
    }
    print(report.write(name, CLAIM, settings, results, device=options.device, targets=targets))


if __name__ == "__main__":
    main()
