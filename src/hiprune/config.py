"""Settings: read once, at start, from flags and an injected environment into a frozen object.

A flag wins over a variable, a variable over the default. A bad value names the key, the value and what
was expected. Settings that every service has stand here; each service adds its own in `settings.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from hiprune.auth import is_private

EMBEDDED_MODEL = Path(__file__).resolve().parents[2] / "models" / "shapes" / "checkpoint" / "llava"


class ConfigError(Exception):
    """A setting is wrong. The message names the key, the value and what was expected."""


class ServiceSettings(BaseModel):
    """What every service needs to know."""

    # the input of an error would be every setting, secrets too, in whatever prints the cause
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, hide_input_in_errors=True)
    env_prefix: ClassVar[str] = "HIPRUNE_"
    service: ClassVar[str] = "service"

    listen: Annotated[str, Field(pattern=r"^(unix:.+|.+:\d+)$")] = Field(
        "127.0.0.1:50050", description="address to serve on: HOST:PORT or unix:PATH"
    )
    model: str = Field(str(EMBEDDED_MODEL), description="Hugging Face directory or hub id of the model")
    allow_anonymous: bool = Field(False, description="serve strangers beyond this machine without keys")
    max_message_bytes: int = Field(
        256 * 2**20, ge=2**20, le=2**31 - 1, description="largest gRPC message, in bytes"
    )
    default_deadline_ms: int = Field(
        60_000, ge=1, le=3_600_000, description="deadline of a request that brings none, in milliseconds"
    )
    drain_ms: int = Field(
        30_000, ge=0, le=3_600_000, description="time for running requests after SIGTERM, in milliseconds"
    )
    max_connection_age_ms: int = Field(
        600_000, ge=1000, le=86_400_000, description="age at which a client must reconnect, in milliseconds"
    )
    threads: int = Field(0, ge=0, le=1024, description="CPU threads for model work; 0 lets torch decide")
    otlp_endpoint: str = Field("", description="OTLP collector HOST:PORT for traces; empty: silent")
    log_level: Annotated[str, Field(pattern=r"^(debug|info|warning|error)$")] = Field(
        "info", description="debug, info, warning or error"
    )

    @field_validator("listen")
    @classmethod
    def _port_exists(cls, listen: str) -> str:
        if not listen.startswith("unix:") and int(listen.rpartition(":")[2]) > 65_535:
            raise ValueError("a port up to 65535")  # gRPC would take the lower 16 bits and say nothing
        return listen

    @model_validator(mode="after")
    def _strangers_only_by_consent(self) -> Self:
        if not self.allow_anonymous and not is_private(self.listen):
            raise ValueError(
                f"listen is {self.listen!r}, reachable from other machines, and no tenants are configured: "
                "use a loopback address or a Unix socket, or set allow_anonymous"
            )
        return self

    @property
    def max_request_bytes(self) -> int:
        """Largest message to receive: a service that can need no more than less says so."""
        return self.max_message_bytes

    @classmethod
    def read(cls, argv: Sequence[str], environ: Mapping[str, str]) -> Self:
        """The settings of a process. Raises ConfigError; `--help` prints every setting and exits."""
        parser = argparse.ArgumentParser(prog=f"python -m services.{cls.service}", description=cls.__doc__)
        for name, field in cls.model_fields.items():
            default = field.get_default()
            is_switch = field.annotation is bool
            shown = default if str(default) else "empty"
            text = f"{field.description} [{cls.env_prefix}{name.upper()}; default: {shown}]"
            parser.add_argument(
                f"--{name.replace('_', '-')}",
                default=argparse.SUPPRESS,
                help=text.replace("%", "%%"),
                action=argparse.BooleanOptionalAction if is_switch else "store",
            )
        values: dict[str, Any] = {
            name: environ[key]
            for name in cls.model_fields
            if (key := f"{cls.env_prefix}{name.upper()}") in environ
        }
        values |= vars(parser.parse_args(argv))
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError("; ".join(cls._explain(each) for each in error.errors())) from error

    @classmethod
    def _explain(cls, problem: Any) -> str:
        """`max_queue (--max-queue, HIPRUNE_ENCODER_MAX_QUEUE): got '0', expected …`."""
        if not problem["loc"]:
            return str(problem["ctx"]["error"]) if "ctx" in problem else str(problem["msg"])
        name = str(problem["loc"][0])
        secret = cls.model_fields[name].annotation is SecretStr
        got = "a secret" if secret else repr(problem["input"])
        return (
            f"{name} (--{name.replace('_', '-')}, {cls.env_prefix}{name.upper()}): "
            f"got {got}, expected: {problem['msg'].removeprefix('Value error, ')}"
        )
