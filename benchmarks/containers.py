"""Claim: the images hold what they need and no more, and the stack of docker-compose.yml comes back.

    deploy/smoke.sh [--no-build]

- Images: built, their sizes by layer, and what each shows of itself when it runs: its user, what can be
  written, that there is no compiler, no pip, no GPU wheel and no other service in it.
- A pod's start: the pruner first, alive and ready while there is no encoder, then everything.
- Answers: `hiprune ask` with each method, and one over HTTP; rows that cross from encoder to pruner through
  shared memory.
- `kill -9` of everything in each container in turn, under questions about pictures that nobody has seen: none
  is answered wrong, and how long it takes until the next right answer.
- A pod's end, under the same: the pruner is told to stop, and the encoder when that is gone; then the rest.
  What was asked before is answered.

Starts a Compose project of its own on a port of its own, and removes it. Knows Docker by its commands alone.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
import zlib
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from benchmarks import report
from hiprune.client import Client
from hiprune.errors import HipruneError
from hiprune.stack import free_port
from hiprune.v1 import pruner_service_pb2

CLAIM: Final = (
    "the images hold what they need and no more, and the stack answers, comes back after kill -9 of any of "
    "its containers and loses no request when it is told to stop"
)
ROOT: Final = Path(__file__).resolve().parents[1]
SAMPLES: Final = ROOT / "models" / "shapes" / "samples"
WITH_MODEL: Final = ("encoder", "pruner", "llm")
SERVICES: Final = (*WITH_MODEL, "gateway")
CONTAINERS: Final = ("redis", *SERVICES)
NOT_MISSED: Final = ("redis", "gateway")
"""Without these, the front door answers as before."""
METHODS: Final = ("none", "hiprune", "hiprune++")
PROJECT: Final = "hiprune-smoke"
SHARED: Final = "an answer's rows came through shared memory"
READY: Final = "ready on"
START_S: Final = 300.0
LOAD: Final = 4
"""Questions under way at a time."""

LOOK_INSIDE: Final = """
import importlib.util, json, os, shutil
has = {name: importlib.util.find_spec(name) is not None for name in ('pip', 'PIL', 'torch', 'triton')}
if has['torch']:
    import torch
def writable(folder):
    try:
        open(os.path.join(folder, 'probe'), 'w').close()
        return True
    except OSError:
        return False
def is_stale(compiled):
    source, _, rest = compiled.removeprefix('/opt/bytecode').rpartition('.cpython-')
    with open(compiled, 'rb') as file:
        header = file.read(16)
    with open(source + '.py', 'rb') as file:
        return header[4:] != b'\\1\\0\\0\\0' + importlib.util.source_hash(file.read())
compiled = [os.path.join(folder, name) for folder, _, names in os.walk('/opt/bytecode') for name in names]
print(json.dumps({
    'compiled_files': len(compiled),
    'stale': sum(map(is_stale, compiled)),
    'user': os.getuid(),
    'services': sorted(e.name for e in os.scandir('/app/services') if e.is_dir() and e.name != '__pycache__'),
    'compilers': [name for name in ('cc', 'gcc', 'clang', 'g++') if shutil.which(name)],
    'flock': shutil.which('flock'),
    'has': sorted(name for name in has if has[name]),
    'torch_cuda': torch.version.cuda if has['torch'] else None,
    'writable': [each for each in ('/', '/app', '/opt', '/opt/venv', '/run', '/tmp') if writable(each)],
}))
"""


def main() -> None:
    """Runs the steps in order; ends with 1 and a sentence where one finds something wrong."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--no-build", action="store_true", help="take the images that are there")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        stack = Compose(Path(scratch))
        try:
            results, problems = asyncio.run(run(stack, build=not chosen.no_build))
        finally:
            stack.remove()
    path = report.write("containers", CLAIM, {"compose": stack.version, "load": LOAD}, results)
    show(results)
    print(f"written to {path.relative_to(ROOT)}")
    if problems:
        raise SystemExit("smoke: " + "; ".join(problems))


async def run(stack: Compose, *, build: bool) -> tuple[dict[str, Any], list[str]]:
    """What was found, and what of it is wrong."""
    problems: list[str] = []
    results: dict[str, Any] = {"engine": docker("version", "--format", "{{.Server.Version}}").strip()}
    if build:
        say("building the images")
        begun = time.monotonic()
        stack("build", *SERVICES, show=True)
        results["build_s"] = round(time.monotonic() - begun, 1)
    say("looking into the images")
    results["images"] = look_at_images(stack.version_of_images, problems)
    say("starting the pruner, with no encoder there")
    results["start"] = start_like_a_pod(stack, problems)
    async with Client(stack.address, timeout_s=10) as client:
        asker = Asker(client)
        say("asking")
        results["answers"] = ask_by_command(stack, problems)
        results["answers"]["over_http"] = ask_by_http(stack, problems)
        await asker.settle()
        if SHARED not in stack.logs("pruner"):
            problems.append("no row came through shared memory")
        results["shared_memory"] = stack.logs("pruner").count(SHARED)
        results["kill"] = {}
        for name in reversed(CONTAINERS):
            say(f"kill -9 of everything in {name}")
            results["kill"][name] = await kill(stack, asker, name, problems)
        say("stopping the pod of encoder and pruner, and then the rest")
        results["stop"] = await stop_like_a_pod(stack, asker, problems)
    return results, problems


# --- the images ------------------------------------------------------------------------------------------


def look_at_images(version: str, problems: list[str]) -> dict[str, Any]:
    """Sizes by layer and what each image is like when it runs."""
    found: dict[str, Any] = {}
    layers: dict[str, list[str]] = {}
    for service in SERVICES:
        image = f"hiprune/{service}:{version}"
        told = json.loads(docker("image", "inspect", image))[0]
        layers[service] = told["RootFS"]["Layers"]
        inside = json.loads(
            docker(
                *("run", "--rm", "--read-only", "--cap-drop=ALL", "--network=none", "--tmpfs=/tmp"),
                *("--entrypoint=python", image, "-c", LOOK_INSIDE),
            )
        )
        found[service] = {"bytes": told["Size"], "layers": layers_of(image), "inside": inside}
        wrong = {
            "runs as root": inside["user"] == 0,
            "holds a compiler": inside["compilers"],
            "has compiled code that is not its source's": inside["stale"] or not inside["compiled_files"],
            "holds pip in its environment": "pip" in inside["has"],
            f"holds other services: {inside['services']}": inside["services"] != [service],
            "holds a GPU's torch": inside["torch_cuda"],
            "holds an image decoder that it does not need": "PIL" in inside["has"] and service != "encoder",
            "holds torch, which it does not need": "torch" in inside["has"] and service not in WITH_MODEL,
            "has no flock, by which the manifests order the end of a pod": not inside["flock"],
            f"can write to {inside['writable']}": inside["writable"] != ["/tmp"],
        }
        problems += [f"the image of {service} {what}" for what, is_so in wrong.items() if is_so]
    # a layer that is in several images is kept once
    digests = [layers[service] for service in WITH_MODEL]
    common = sum(len(set(each)) == 1 for each in zip(*digests, strict=False))
    if common <= 2:
        problems.append("the images with a model share no layer of libraries")
    base = found["gateway"]["layers"][0]["bytes"]
    shared = sum(layer["bytes"] for layer in found["encoder"]["layers"][:common])
    together = sum(each["bytes"] for each in found.values()) - (len(WITH_MODEL) - 1) * shared - base
    return {**found, "base_bytes": base, "shared_bytes": shared, "together_bytes": together}


def layers_of(image: str) -> list[dict[str, Any]]:
    """The layers that hold something, from the base up."""
    lines = docker("history", "--no-trunc", "--human=false", "--format={{.Size}}\t{{.CreatedBy}}", image)
    found = []
    for line in reversed(lines.splitlines()):
        size, _, made_by = line.partition("\t")
        if int(size):
            said = re.sub(r"\|\d.*?/bin/sh -c |/bin/sh -c #\(nop\) |(dir|file|multi):\w+ (in )?", "", made_by)
            found.append({"bytes": int(size), "made_by": " ".join(said.split())[:80] or "the base image"})
    return found


# --- the stack -------------------------------------------------------------------------------------------


def start_like_a_pod(stack: Compose, problems: list[str]) -> dict[str, Any]:
    """Redis and the pruner first; and when that is healthy, the rest. Seconds from each one's start."""
    healthy_s = {}
    for name in ("redis", "pruner"):
        stack("up", "-d", "--no-deps", name)
        stack.wait_healthy(name)
        healthy_s[name] = stack.healthy_s(name)
    if stack.container("encoder"):
        problems.append("the encoder was started with the pruner")
    alone = stack.health_inside("pruner", "liveness"), stack.health_inside("pruner", "")
    say("starting the encoder and the language model")
    begun = time.monotonic()
    stack("up", "-d", "encoder", "llm", "gateway")
    for name in ("encoder", "llm", "gateway"):
        stack.wait_healthy(name)
        healthy_s[name] = stack.healthy_s(name)
    whole = time.monotonic() - begun
    return {
        "pruner_alone": {"alive": alone[0], "ready": alone[1]},
        "ready_s": {name: stack.ready_s(name) for name in WITH_MODEL},
        "healthy_s": healthy_s,
        "the_rest_in_order_s": round(whole, 1),
    }


def ask_by_command(stack: Compose, problems: list[str]) -> dict[str, Any]:
    """`hiprune ask` as a person would, with each method."""
    question = json.loads((SAMPLES / "questions.json").read_text("utf-8"))[0]
    found = {}
    for method in METHODS:
        picture = str(SAMPLES / question["image"])
        command = [str(Path(sys.executable).parent / "hiprune"), "ask", picture, question["question"]]
        options = ["--address", stack.address, "--method", method, "--json"]
        answer = json.loads(
            subprocess.run([*command, *options], capture_output=True, text=True, check=True).stdout
        )
        usage = answer["completion"]["usage"]
        found[method] = {
            "answer": answer["answer"],
            "visual_tokens": [usage["visualTokensBefore"], usage["visualTokensAfter"]],
        }
        if answer["answer"].strip() != question["truth"]:
            problems.append(f"{method} answers {answer['answer']!r}, expected {question['truth']!r}")
    return found


def ask_by_http(stack: Compose, problems: list[str]) -> str:
    """The same question, as any client of OpenAI's API would put it."""
    question = json.loads((SAMPLES / "questions.json").read_text("utf-8"))[0]
    picture = base64.b64encode((SAMPLES / question["image"]).read_bytes()).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
        {"type": "text", "text": question["question"]},
    ]
    body = json.dumps({"model": "llava", "messages": [{"role": "user", "content": parts}]}).encode()
    request = urllib.request.Request(
        f"http://{stack.http_address}/v1/chat/completions", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        answer = str(json.load(response)["choices"][0]["message"]["content"])
    if answer.strip() != question["truth"]:
        problems.append(f"the gateway answers {answer!r}, expected {question['truth']!r}")
    return answer


async def kill(stack: Compose, asker: Asker, name: str, problems: list[str]) -> dict[str, Any]:
    """Kills everything in a container while questions are asked, until it is back and they are answered."""
    started = stack.started(name)
    asker.begin()
    load = asyncio.create_task(asker.load())
    await asyncio.sleep(1.0)
    # on a thread, all of it: answers are to be seen when they come
    await asyncio.to_thread(stack.kill_inside, name)
    begun = time.monotonic()
    while await asyncio.to_thread(stack.started, name) == started:
        if time.monotonic() - begun > START_S:
            problems.append(f"{name} was not started again")
            break
        await asyncio.sleep(0.1)
    back = time.monotonic()
    await asyncio.to_thread(stack.wait_healthy, name)
    healthy_s = time.monotonic() - begun
    while asker.last_right < back and time.monotonic() - begun < START_S:  # noqa: ASYNC110  # a count
        await asyncio.sleep(0.1)
    first_right = next((at for at in asker.right_at if at > back), None)
    await asyncio.sleep(1.0)
    asker.end()
    await load
    if asker.wrong:
        problems.append(f"{asker.wrong} wrong answers around the end of {name}")
    if first_right is None:
        problems.append(f"no right answer after the end of {name}")
    if name in NOT_MISSED and asker.refused:
        problems.append(f"{sum(asker.refused.values())} requests failed for want of the {name}")
    return {
        "started_again_s": round(back - begun, 2),
        "right_answer_s": None if first_right is None else round(first_right - begun, 2),
        "healthy_s": round(healthy_s, 1),
        **asker.summary(),
    }


async def stop_like_a_pod(stack: Compose, asker: Asker, problems: list[str]) -> dict[str, Any]:
    """The pruner is told first, the encoder when it is gone; then the front door and Redis."""
    asker.begin()
    load = asyncio.create_task(asker.load())
    await asyncio.sleep(2.0)
    told = time.monotonic()
    for name in ("pruner", "encoder"):
        await asyncio.to_thread(docker, "stop", "--time=60", stack.container(name))
    gone_s = time.monotonic() - told
    await asyncio.sleep(0.5)
    asker.end()
    await load
    lost = [begun for begun, _ in asker.failures if begun < told]
    if lost:
        problems.append(f"{len(lost)} requests were lost that had begun before the pod was told to stop")
    if asker.wrong:
        problems.append(f"{asker.wrong} wrong answers while the pod stopped")
    await asyncio.to_thread(stack, "stop", "--timeout", "60")
    codes = {name: stack.state(name)["ExitCode"] for name in SERVICES}
    problems += [f"{name} left with code {code}" for name, code in codes.items() if code]
    return {"pod_gone_s": round(gone_s, 1), "lost": len(lost), "exit_codes": codes, **asker.summary()}


class Asker:
    """Asks about pictures that nobody has seen, several at a time, and counts how that ends."""

    def __init__(self, client: Client) -> None:
        self._client = client
        question = json.loads((SAMPLES / "questions.json").read_text("utf-8"))[0]
        self._question = question["question"]
        self._picture = (SAMPLES / question["image"]).read_bytes()
        self._asked = 0
        self._going = False
        self._expected = ""
        self.begin()

    def begin(self) -> None:
        """Counts from nothing."""
        self.right_at: list[float] = []
        self.last_right = 0.0
        self.wrong = 0
        self.failures: list[tuple[float, str]] = []
        self._going = True

    def end(self) -> None:
        """Asks nothing more; what is under way ends by itself."""
        self._going = False

    @property
    def refused(self) -> Counter[str]:
        """How many failed, by their status."""
        return Counter(kind for _, kind in self.failures)

    def summary(self) -> dict[str, Any]:
        """Counts, for the results."""
        return {"right": len(self.right_at), "wrong": self.wrong, "refused": dict(self.refused)}

    async def settle(self) -> None:
        """What the right answer is: the same picture has always the same one."""
        self._expected = await self._ask()

    async def load(self) -> None:
        """Asks until `end`."""
        await asyncio.gather(*(self._keep_asking() for _ in range(LOAD)))

    async def _keep_asking(self) -> None:
        while self._going:
            begun = time.monotonic()
            try:
                answer = await self._ask()
            except HipruneError as error:
                self.failures.append((begun, type(error).__name__))
                await asyncio.sleep(0.1)
                continue
            if answer == self._expected:
                self.last_right = time.monotonic()
                self.right_at.append(self.last_right)
            else:
                self.wrong += 1

    async def _ask(self) -> str:
        self._asked += 1
        policy = pruner_service_pb2.PrunePolicy(method=pruner_service_pb2.METHOD_HIPRUNE)
        picture = noted(self._picture, str(self._asked))
        return (await self._client.ask(self._question, picture, policy=policy)).text


def noted(png: bytes, words: str) -> bytes:
    """The same picture in other bytes: a PNG with a note behind its header. Pixels stay as they are."""
    body = b"tEXt" + b"Comment\0" + words.encode("latin-1")
    chunk = (len(body) - 4).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
    behind_header = 8 + 25  # the signature, and IHDR with its length, name and checksum
    return png[:behind_header] + chunk + png[behind_header:]


class Compose:
    """A Compose project of its own on the repository's file: `stack("up", "-d")`."""

    def __init__(self, scratch: Path) -> None:
        port, http_port = free_port(), free_port()
        self.address, self.http_address = f"127.0.0.1:{port}", f"127.0.0.1:{http_port}"
        plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
        self._program = ["docker-compose"] if plugin.returncode else ["docker", "compose"]
        if plugin.returncode and shutil.which("docker-compose") is None:
            raise SystemExit("smoke: neither `docker compose` nor `docker-compose` is there")
        # so that small answers show the way that large ones take, and say so
        override = scratch / "override.yml"
        override.write_text(
            "services:\n"
            "  encoder: {environment: {HIPRUNE_ENCODER_SHARED_MEMORY_MIN_BYTES: '1'}}\n"
            "  pruner: {environment: {HIPRUNE_PRUNER_LOG_LEVEL: debug}}\n",
            "utf-8",
        )
        files = [
            "--project-directory",
            str(ROOT),
            "-f",
            str(ROOT / "docker-compose.yml"),
            "-f",
            str(override),
        ]
        self._options = ["-p", PROJECT, *files]
        self._ids: dict[str, str] = {}
        self._environ = {**os.environ, "HIPRUNE_PORT": str(port), "HIPRUNE_HTTP_PORT": str(http_port)}
        self.version = self._run("version", "--short").strip()
        settings = dict(
            line.split("=", 1)
            for line in (ROOT / ".env").read_text("utf-8").splitlines()
            if "=" in line and not line.startswith("#")
        )
        self.version_of_images = self._environ.get("HIPRUNE_VERSION", settings["HIPRUNE_VERSION"])

    def __call__(self, *arguments: str, show: bool = False) -> str:
        """One command of Compose's. Ends with its words where it fails."""
        return self._run(*self._options, *arguments, show=show)

    def _run(self, *arguments: str, show: bool = False) -> str:
        command = [*self._program, *arguments]
        output = None if show else subprocess.PIPE
        ran = subprocess.run(
            command, cwd=ROOT, env=self._environ, stdout=output, stderr=output, text=True, check=False
        )
        if ran.returncode:
            raise SystemExit(f"smoke: {' '.join(command)}\n{ran.stdout or ''}{ran.stderr or ''}")
        return ran.stdout or ""

    def remove(self) -> None:
        """Everything of the project, its volumes and networks too."""
        self("down", "--volumes", "--timeout", "60")

    def container(self, name: str) -> str:
        """Its id, the same after a new start; empty where there is none."""
        if not self._ids.get(name):
            # Compose 2 would leave out those that have ended
            every = ["-a"] if self._program[0] == "docker" else []
            self._ids[name] = self("ps", *every, "-q", name).strip()
        return self._ids[name]

    def state(self, name: str) -> dict[str, Any]:
        """What Docker says of it."""
        told: dict[str, Any] = json.loads(docker("inspect", "--format={{json .State}}", self.container(name)))
        return told

    def started(self, name: str) -> str:
        """When it was last started."""
        return str(self.state(name)["StartedAt"])

    def logs(self, name: str) -> str:
        """Everything that it has written."""
        return docker("logs", self.container(name))

    def wait_healthy(self, name: str) -> None:
        """Returns when its health check says so. Ends with its last words where it takes too long."""
        deadline = time.monotonic() + START_S
        while (state := self.state(name))["Health"]["Status"] != "healthy" or not state["Running"]:
            if time.monotonic() > deadline:
                tail = "\n".join(self.logs(name).splitlines()[-20:])
                raise SystemExit(f"smoke: {name} is {state['Status']}, {state['Health']}\n{tail}")
            time.sleep(0.2)

    def ready_s(self, name: str) -> float | None:
        """Seconds from its start to the line in its log that says it is ready."""
        lines = docker("logs", "--timestamps", self.container(name)).splitlines()
        at = next((line.split()[0] for line in lines if READY in line), None)
        return None if at is None else round(seconds_between(self.started(name), at), 1)

    def healthy_s(self, name: str) -> float:
        """Seconds from its start to the end of the first health check, of the last five, that was well."""
        state = self.state(name)
        ends = [each["End"] for each in state["Health"]["Log"] if each["ExitCode"] == 0]
        return round(seconds_between(state["StartedAt"], ends[0]), 1)

    def health_inside(self, name: str, asked: str) -> bool:
        """What its own health command says."""
        command = ["docker", "exec", self.container(name), "python", "-m", "hiprune.health", name, asked]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def kill_inside(self, name: str) -> None:
        """kill -9 of all its processes: after Docker's own `kill` nothing would be started again."""
        ours = ["python", "-c", "import os; os.kill(-1, 9)"]
        program = ["sh", "-c", "kill -9 -1"] if name == "redis" else ours
        subprocess.run(["docker", "exec", self.container(name), *program], capture_output=True, check=False)


def docker(*arguments: str) -> str:
    """One command of Docker's: what it prints, errors too. Ends with that where it fails."""
    ran = subprocess.run(
        ["docker", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if ran.returncode:
        raise SystemExit(f"smoke: docker {' '.join(arguments)}\n{ran.stdout}")
    return ran.stdout


def seconds_between(first: str, second: str) -> float:
    """Two of Docker's moments: 2026-11-22T22:31:00.123456789Z, or with an offset from UTC."""

    def moment(text: str) -> datetime:
        head, _, rest = text.partition(".")
        digits = rest[: len(rest) - len(rest.lstrip("0123456789"))]
        zone = rest[len(digits) :].strip()
        return datetime.fromisoformat(f"{head}.{digits[:6] or '0'}{zone.replace('Z', '+00:00')}")

    return (moment(second) - moment(first)).total_seconds()


def say(step: str) -> None:
    """One line a step."""
    print(f"smoke: {step}", flush=True)


def show(results: dict[str, Any]) -> None:
    """The figures as tables."""
    images, start = results["images"], results["start"]

    def mb(size: int) -> str:
        return f"{size / 1e6:.0f}"

    rows: list[Sequence[object]] = [
        (name, mb(images[name]["bytes"]), start["ready_s"].get(name, ""), start["healthy_s"][name])
        for name in SERVICES
    ]
    report.table("images", ("", "MB", "ready, s", "healthy, s"), rows)
    together, base = mb(images["together_bytes"]), mb(images["base_bytes"])
    print(f"all together {together} MB, of which the base is {base} MB")
    rows = [
        (name, each["started_again_s"], each["right_answer_s"], each["right"], sum(each["refused"].values()))
        for name, each in results["kill"].items()
    ]
    report.table("kill -9", ("", "started again, s", "right answer, s", "right", "refused"), rows)


if __name__ == "__main__":
    main()
