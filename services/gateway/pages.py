"""The playground as the gateway serves it: a page, its modules and style, and sample pictures, from memory.

Everything is read once, at start; what is not among it is not there, whatever a path says. The page may load
from here alone and run no script but its own files'. It asks over the API as any client does: nothing here
knows of an answer, a key or the llm.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from hiprune.config import ConfigError
from services.gateway.settings import Settings

_FOLDER: Final = Path(__file__).resolve().parent / "playground"
_INDEX: Final = "index.html"
_TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_PICTURES: Final = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".gif": "image/gif",
}
MAX_SAMPLES: Final = 12
"""Pictures that are offered: the first that questions.json names."""
MAX_SAMPLE_BYTES: Final = 2**21
_POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS: Final = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    # kept, and asked about each time: by its ETag, which costs no bytes
    "cache-control": "no-cache",
}


class File:
    """A file to serve."""

    def __init__(self, content: bytes, media_type: str) -> None:
        self.content = content
        self.media_type = media_type
        self.tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'


class _Question(BaseModel):
    """A line of questions.json; what else it has is passed over."""

    model_config = ConfigDict(frozen=True)

    image: str
    question: str


class Playground:
    """The files, by path."""

    def __init__(self, settings: Settings) -> None:
        """Reads them. Raises ConfigError for a folder of samples that is none."""
        self._files: dict[str, File] = {}
        if not settings.playground:
            return
        for path in sorted(_FOLDER.iterdir()):
            if path.suffix in _TYPES:
                self._files[f"/playground/{path.name}"] = File(path.read_bytes(), _TYPES[path.suffix])
        self._files["/"] = self._files.pop(f"/playground/{_INDEX}")
        samples = []
        for name, questions in _questions(settings).items():
            address = f"/playground/samples/{name}"
            self._files[address] = _picture(Path(settings.samples), name)
            samples.append({"url": quote(address), "name": Path(name).stem, "questions": questions})
        setup = {"samples": samples, "max_image_bytes": settings.max_image_bytes}
        self._files["/playground/setup.json"] = File(json.dumps(setup).encode(), "application/json")

    @property
    def files(self) -> Mapping[str, File]:
        """What there is; nothing where the playground is off."""
        return self._files

    def add_to(self, app: FastAPI) -> None:
        """Serves the files. They are no part of the API, so its description does not have them."""
        for path in self._files:
            app.add_api_route(path, self._serve, methods=["GET", "HEAD"], include_in_schema=False)

    async def _serve(self, request: Request) -> Response:
        file = self._files[request.scope["route"].path]
        headers = {**_HEADERS, "etag": file.tag}
        known = [
            each.strip().removeprefix("W/") for each in request.headers.get("if-none-match", "").split(",")
        ]
        if file.tag in known:
            return Response(status_code=304, headers=headers)
        return Response(file.content, headers=headers, media_type=file.media_type)


def _questions(settings: Settings) -> dict[str, list[str]]:
    """The samples' questions by picture, in the file's order. Raises ConfigError."""
    path = Path(settings.samples) / "questions.json"
    if not settings.samples or (not settings.samples_wanted and not path.exists()):
        return {}
    try:
        lines: list[Any] = TypeAdapter(list[_Question]).validate_json(path.read_bytes())
    except OSError as error:
        raise _wrong(settings.samples, f"a folder with a questions.json: {error.strerror}") from error
    except ValidationError as error:
        raise _wrong(settings.samples, "a questions.json that is a list of {image, question}") from error
    found: dict[str, list[str]] = {}
    for line in lines:
        if line.image in found or len(found) < MAX_SAMPLES:
            found.setdefault(line.image, []).append(line.question)
    return found


def _picture(folder: Path, name: str) -> File:
    """A sample. Raises ConfigError."""
    path = folder / name
    kind = _PICTURES.get(path.suffix.lower())
    if kind is None or Path(name).name != name:
        raise _wrong(str(folder), f"pictures by name, of {', '.join(_PICTURES)}, where it names {name!r}")
    try:
        size = path.stat().st_size
        if size > MAX_SAMPLE_BYTES:
            expected = f"at most {MAX_SAMPLE_BYTES} bytes a picture, where {name} has {size}"
            raise _wrong(str(folder), expected)
        return File(path.read_bytes(), kind)
    except OSError as error:
        raise _wrong(str(folder), f"the {name} that it names: {error.strerror}") from error


def _wrong(folder: str, expected: str) -> ConfigError:
    return ConfigError(f"samples (--samples, HIPRUNE_GATEWAY_SAMPLES): got {folder!r}, expected {expected}")
