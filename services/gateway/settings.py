"""Settings of the gateway. Read once at start; see `hiprune.config` for where values come from."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Final

from pydantic import Field, field_validator

from hiprune.config import EMBEDDED_MODEL, ProcessSettings

_SAMPLES: Final = EMBEDDED_MODEL.parents[1] / "samples"
_HOST: Final = re.compile(r"(\*\.)?([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)*[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
"""A host's name, or all names below one."""


class Settings(ProcessSettings):
    """The HTTP door: OpenAI's chat API, answered by the language model over gRPC."""

    env_prefix: ClassVar[str] = "HIPRUNE_GATEWAY_"
    service: ClassVar[str] = "gateway"

    listen: Annotated[str, Field(pattern=r"^(unix:.+|.+:\d+)$")] = Field(
        "127.0.0.1:8080", description="address to serve on: HOST:PORT or unix:PATH"
    )
    llm: Annotated[str, Field(pattern=r"^(unix:.+|.+:\d+)$")] = Field(
        "127.0.0.1:50053", description="address of the llm: HOST:PORT or unix:PATH"
    )
    max_body_bytes: int = Field(
        64 * 2**20, ge=1024, le=2**31 - 1, description="largest request body, images in base64, in bytes"
    )
    max_held_bytes: int = Field(
        160 * 2**20,
        ge=1024,
        le=2**40,
        description="bodies of all requests that wait for their first word together, in bytes; more are "
        "refused as OVERLOADED. A body takes up to 4 times its size while it becomes a request for the llm: "
        "give the process so much, and 256 MiB (the default fits a container of 1 GiB)",
    )
    body_timeout_ms: int = Field(
        30_000, ge=1, le=3_600_000, description="time in which a request's body must come, in milliseconds"
    )
    max_images: int = Field(8, ge=1, le=1000, description="most images of a request")
    max_image_bytes: int = Field(
        20 * 2**20, ge=1, le=2**31 - 1, description="largest encoded image, in bytes"
    )
    image_hosts: Annotated[str, Field(max_length=100_000)] = Field(
        "",
        description="hosts that images may be fetched from, separated by commas: images.example, "
        "*.cdn.example; empty: images come in the request alone",
    )
    image_http: bool = Field(False, description="fetch from those hosts by http too, and not https alone")
    image_timeout_ms: int = Field(
        10_000, ge=1, le=600_000, description="time to fetch one image, redirects included, in milliseconds"
    )

    playground: bool = Field(True, description="serve the playground, a web page to ask on, at /")
    samples: str = Field(
        str(_SAMPLES),
        description="folder of the pictures that the playground offers, with their questions in "
        "questions.json; empty, or the default and not there: it offers none",
    )

    @field_validator("image_hosts")
    @classmethod
    def _hosts_are_names(cls, hosts: str) -> str:
        for host in _split(hosts):
            if not _HOST.fullmatch(host):
                raise ValueError(f"names of hosts, without port or path, and {host!r} is none")
        return hosts

    @property
    def samples_wanted(self) -> bool:
        """Whether the operator has named a folder: then it must be one."""
        return self.samples not in ("", str(_SAMPLES))

    @property
    def hosts(self) -> tuple[str, ...]:
        """The names of `image_hosts`."""
        return _split(self.image_hosts)


def _split(hosts: str) -> tuple[str, ...]:
    return tuple(each.strip().lower() for each in hosts.split(",") if each.strip())
