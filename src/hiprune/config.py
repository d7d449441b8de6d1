"""Settings: read once, at start, from flags and an injected environment into a frozen object.

A flag wins over a variable, a variable over the default. A bad value names the key, the value and what
was expected. Settings that every process has stand here, and those that every gRPC service has; each adds its
own in `settings.py`.
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

from hiprune.auth import is_private, is_unix

EMBEDDED_MODEL = Path(__file__).resolve().parents[2] / "models" / "shapes" / "checkpoint" / "llava"


class ConfigError(Exception):
    """A setting is wrong. The message names the key, the value and what was expected."""


class ProcessSettings(BaseModel):
    """What every process needs to know, whatever it speaks."""

    # the input of an error would be every setting, secrets too, in whatever prints the cause
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, hide_input_in_errors=True)
    env_prefix: ClassVar[str] = "HIPRUNE_"
    service: ClassVar[str] = "service"

    listen: Annotated[str, Field(pattern=r"^(unix:.+|.+:\d+)$")] = Field(
        "127.0.0.1:50050", description="address to serve on: HOST:PORT or unix:PATH"
    )
    allow_anonymous: bool = Field(False, description="serve strangers beyond this machine without keys")
    tls_cert: str = Field(
        "", description="PEM file of the certificate to serve with, and to show to other services"
    )
    tls_key: str = Field("", description="PEM file of its key, without a password")
    tls_ca: str = Field(
        "",
        description="PEM file of the authority whose certificates other services must have; with one, this "
        "service calls others by TLS, but on Unix sockets",
    )
    max_message_bytes: int = Field(
        256 * 2**20, ge=2**20, le=2**31 - 1, description="largest gRPC message, in bytes"
    )
    max_requests: int = Field(
        1024,
        ge=1,
        le=1_000_000,
        description="most requests at a time, from the call until its answer has been sent; more are refused "
        "as OVERLOADED",
    )
    default_deadline_ms: int = Field(
        60_000, ge=1, le=3_600_000, description="deadline of a request that brings none, in milliseconds"
    )
    max_deadline_ms: int = Field(
        600_000,
        ge=1,
        le=86_400_000,
        description="longest deadline of a request, in milliseconds; one that is further away is cut to it",
    )
    drain_ms: int = Field(
        30_000, ge=0, le=3_600_000, description="time for running requests after SIGTERM, in milliseconds"
    )
    otlp_endpoint: Annotated[str, Field(pattern=r"^((https?://)?[^\s/]+:\d+)?$")] = Field(
        "",
        description="OTLP collector for traces and metrics, HOST:PORT for gRPC in plain text, "
        "https://HOST:PORT for TLS; empty: neither is sent",
    )
    trace_ratio: float = Field(
        1.0,
        ge=0.0,
        le=1.0,
        description="share of requests that are traced, where their caller has not decided it already",
    )
    metrics_listen: Annotated[str, Field(pattern=r"^(\S+:\d+)?$")] = Field(
        "", description="HOST:PORT on which Prometheus finds /metrics, for everybody; empty: nowhere"
    )
    log_level: Annotated[str, Field(pattern=r"^(debug|info|warning|error)$")] = Field(
        "info", description="debug, info, warning or error"
    )
    log_format: Annotated[str, Field(pattern=r"^(text|json)$")] = Field(
        "text", description="text for people, or json: one object a line, with trace and span ids"
    )

    @field_validator("listen", "listen_also", check_fields=False)
    @classmethod
    def _sockets_have_files(cls, listen: str) -> str:
        if listen.startswith("unix-abstract:"):
            # such a socket has no file, so no permissions: everybody on the machine would count as a service
            raise ValueError("HOST:PORT or unix:PATH")
        return listen

    @field_validator("listen", "listen_also", "metrics_listen", "otlp_endpoint", check_fields=False)
    @classmethod
    def _port_exists(cls, address: str) -> str:
        if address and not address.startswith("unix:") and int(address.rpartition(":")[2]) > 65_535:
            raise ValueError("a port up to 65535")  # gRPC would take the lower 16 bits and say nothing
        return address

    @model_validator(mode="after")
    def _the_default_deadline_is_allowed(self) -> Self:
        if self.default_deadline_ms > self.max_deadline_ms:
            raise ValueError(
                f"{self._named('default_deadline_ms')}: got {self.default_deadline_ms}, expected at most "
                f"max_deadline_ms, which is {self.max_deadline_ms}"
            )
        return self

    @model_validator(mode="after")
    def _a_certificate_has_a_key(self) -> Self:
        if bool(self.tls_cert) != bool(self.tls_key):
            missing = "tls_key" if self.tls_cert else "tls_cert"
            raise ValueError(f"{self._named(missing)}: is empty, expected a file as its other half is given")
        return self

    def _secret(self, name: str) -> str:
        value: SecretStr = getattr(self, name)
        return value.get_secret_value()

    def _named(self, name: str) -> str:
        """A setting by all its names, for messages."""
        return f"{name} (--{name.replace('_', '-')}, {self.env_prefix}{name.upper()})"

    @classmethod
    def read(cls, argv: Sequence[str], environ: Mapping[str, str]) -> Self:
        """The settings of a process. Raises ConfigError; `--help` prints every setting and exits."""
        parser = argparse.ArgumentParser(prog=f"python -m services.{cls.service}", description=cls.__doc__)
        for name, field in cls.model_fields.items():
            default = field.get_default()
            is_switch = field.annotation is bool
            shown = default if str(default) else "empty"
            text = f"{field.description} [{cls.env_prefix}{name.upper()}; default: {shown}]"
            if field.annotation is SecretStr:
                text += "; better in the variable: a flag is seen by every user of the machine"
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


class ServiceSettings(ProcessSettings):
    """What every gRPC service needs to know besides."""

    peers_wanted: ClassVar[bool] = False
    """Other services are this one's usual callers: once it can tell them, it refuses strangers."""
    next_hop: ClassVar[str] = ""
    """The setting with the address of the service that this one calls; empty: it calls none."""

    listen_also: Annotated[str, Field(pattern=r"^(unix:.+|.+:\d+)?$")] = Field(
        "",
        description="one more address to serve on, such as a port for clients beside a Unix socket for "
        "services; empty: none",
    )
    model: str = Field(str(EMBEDDED_MODEL), description="Hugging Face directory or hub id of the model")
    tenants: str = Field(
        "",
        description="file of tenants and their hashed keys, as `hiprune tenant add` writes it; with one, "
        "callers need a key",
    )
    limits_redis_url: SecretStr = Field(
        SecretStr(""),
        description="URL of the Redis in which replicas count tenants' limits together; empty: each alone",
    )
    peer_token: SecretStr = Field(
        SecretStr(""),
        description="secret by which services know each other, the same for all, at least 16 characters",
    )
    tls_client_auth: bool = Field(
        False, description="serve only those who show a certificate of tls_ca's; they count as services"
    )
    max_connection_age_ms: int = Field(
        600_000, ge=1000, le=86_400_000, description="age at which a client must reconnect, in milliseconds"
    )
    threads: int = Field(0, ge=0, le=1024, description="CPU threads for model work; 0 lets torch decide")

    @model_validator(mode="after")
    def _strangers_only_by_consent(self) -> Self:
        tells_peers = self.tls_client_auth or self.peers_only
        public = [
            f"{name} is {address!r}" for name, address in self.addresses.items() if not is_private(address)
        ]
        if public and not (self.allow_anonymous or self.tenants or tells_peers):
            raise ValueError(
                f"{public[0]}, reachable from other machines, and no tenants are configured: "
                "use a loopback address or a Unix socket, or set tenants or allow_anonymous"
            )
        return self

    @model_validator(mode="after")
    def _trust_is_complete(self) -> Self:
        token = self._secret("peer_token")
        if token and len(token) < 16:
            raise ValueError(f"{self._named('peer_token')}: {len(token)} characters, expected at least 16")
        if self.tls_client_auth and not (self.tls_cert and self.tls_ca):
            raise ValueError(f"{self._named('tls_client_auth')}: needs tls_cert, tls_key and tls_ca")
        there = getattr(self, self.next_hop) if self.next_hop else ""
        if self.tenants and there and not self.is_known_at(there):
            raise ValueError(
                f"{self._named('tenants')}: the {self.next_hop} at {there!r} has no reason to believe this "
                "service whose request it sends: set peer_token on both, or TLS with tls_client_auth there, "
                "or use a Unix socket"
            )
        return self

    @property
    def addresses(self) -> dict[str, str]:
        """Where it serves, one address or two, by setting."""
        also = {"listen_also": self.listen_also} if self.listen_also else {}
        return {"listen": self.listen, **also}

    def is_known_at(self, address: str) -> bool:
        """Whether a service at an address can tell that this one calls."""
        return is_unix(address) or bool(self._secret("peer_token")) or bool(self.tls_cert and self.tls_ca)

    @property
    def peers_only(self) -> bool:
        """Whether callers without a key must be other services."""
        return self.peers_wanted and (self.tls_client_auth or bool(self._secret("peer_token")))

    @property
    def max_request_bytes(self) -> int:
        """Largest message to receive: a service that can need no more than less says so."""
        return self.max_message_bytes
