"""The tenants file: who may use a service, with which keys, up to which limits. YAML, reloaded on change.

    tenants:
      acme:
        keys: [{id: …, salt: …, sha256: …, created: …}]   # as many as are needed to change them in peace
        limits: {requests_per_minute: 60, tokens_per_minute: 20000, concurrency: 4, max_image_pixels: 4000000}
        policy: {method: hiprune++, keep_ratio: 0.25}

A key is 256 random bits. Of those the file holds a salted SHA-256, and that is enough: a slow hash makes
guessing dear where secrets are few, as with passwords, and nobody guesses one of 2^256. So a stolen file
gives no key away, and checking one costs a microsecond and not the tenth of a second that a flood of wrong
keys would turn into an outage. Knows no request and no limit's count.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import os
import re
import secrets
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hiprune.auth import TENANT_NAME, Limits, Tenant
from hiprune.config import ConfigError
from hiprune.policies import METHODS
from hiprune.v1 import pruner_service_pb2 as pb

if TYPE_CHECKING:
    import yaml

log = logging.getLogger("hiprune.tenants")

POLL_S: Final = 1.0
"""How often the file is looked at. A key that is removed works for that much longer at most."""

MAX_FILE_BYTES: Final = 16 * 2**20
_KEY: Final = re.compile(r"hiprune_([0-9a-f]{16})_[A-Za-z0-9_-]{43}")
_OTHERS: Final = stat.S_IRWXO


# --- keys --------------------------------------------------------------------------------------------------


class KeyEntry(BaseModel):
    """What is kept of a key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    """Its public part, by which it is looked up; random, too."""
    salt: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    created: date | None = None

    def fits(self, key: str) -> bool:
        """Whether this is an entry of `key`; compared in a time that does not depend on where they differ."""
        return hmac.compare_digest(self.sha256, _digest(key, self.salt))


def new_key(today: date) -> tuple[str, KeyEntry]:
    """A key, which is kept nowhere, and its entry in the file."""
    key_id, salt = secrets.token_hex(8), secrets.token_hex(16)
    key = f"hiprune_{key_id}_{secrets.token_urlsafe(32)}"
    return key, KeyEntry(id=key_id, salt=salt, sha256=_digest(key, salt), created=today)


def _digest(key: str, salt: str) -> str:
    return hashlib.sha256(f"hiprune key 1 {salt} {key}".encode()).hexdigest()


_NOBODYS: Final = KeyEntry(id="0" * 16, salt="0" * 32, sha256="0" * 64)
"""What a key of an unknown id is compared with, so that it takes as long to refuse as any other."""


# --- the file ----------------------------------------------------------------------------------------------

Count: TypeAlias = Annotated[int, Field(strict=True, ge=1, le=2**31 - 1)]
Share: TypeAlias = Annotated[float, Field(strict=True, ge=0, le=1)]


class LimitsEntry(BaseModel):
    """A tenant's limits; see `hiprune.auth.Limits`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    concurrency: Count | None = None
    max_image_bytes: Count | None = None
    max_image_pixels: Count | None = None


class PolicyEntry(BaseModel):
    """A tenant's default policy; the fields are those of the wire's PrunePolicy."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str | None = None
    keep_count: Count | None = None
    keep_ratio: Annotated[float, Field(strict=True, gt=0, le=1)] | None = None
    alpha: Share | None = None
    object_layer: Count | None = None
    beta: Share | None = None

    @model_validator(mode="after")
    def _names_a_method_and_one_budget(self) -> Self:
        if self.method is not None and self.method not in METHODS:
            raise ValueError(f"method: got {self.method!r}, expected one of {', '.join(METHODS)}")
        if self.keep_count is not None and self.keep_ratio is not None:
            raise ValueError("keep_count and keep_ratio: expected one of them")
        return self

    def to_proto(self) -> pb.PrunePolicy:
        """The policy, unset where the file says nothing."""
        policy = pb.PrunePolicy(**self.model_dump(exclude_none=True, exclude={"method"}))
        if self.method is not None:
            policy.method = METHODS[self.method]
        return policy


class TenantEntry(BaseModel):
    """One tenant. Without keys it is nobody's; `anonymous` never has any, and limits those who bring none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: tuple[KeyEntry, ...] = ()
    limits: LimitsEntry = LimitsEntry()
    policy: PolicyEntry = PolicyEntry()


class TenantsFile(BaseModel):
    """The whole file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tenants: dict[Annotated[str, Field(pattern=f"^{TENANT_NAME.pattern}$")], TenantEntry] = Field(
        default_factory=dict
    )


@dataclass(frozen=True)
class Tenants:
    """The tenants of one state of the file: `hiprune.auth.Accounts`."""

    by_name: Mapping[str, Tenant]
    by_key_id: Mapping[str, tuple[KeyEntry, Tenant]]

    def of_key(self, key: str) -> Tenant | None:
        """The tenant whose key this is, found by the key's public part."""
        match = _KEY.fullmatch(key)
        entry, tenant = self.by_key_id.get(match.group(1) if match else "", (_NOBODYS, None))
        return tenant if entry.fits(key) else None

    def named(self, name: str) -> Tenant | None:
        """The tenant of that name."""
        return self.by_name.get(name)


def of_file(content: TenantsFile) -> Tenants:
    """The tenants of a checked file. Raises ValueError for a key id that two keys share."""
    by_name, by_key_id = {}, {}
    for name, entry in content.tenants.items():
        tenant = Tenant(name, Limits(**entry.limits.model_dump()), entry.policy.to_proto())
        by_name[name] = tenant
        for key in entry.keys:
            if key.id in by_key_id:
                raise ValueError(f"tenants.{name}.keys: id {key.id} is another key's already")
            by_key_id[key.id] = (key, tenant)
    return Tenants(by_name, by_key_id)


def parse(text: str, where: str) -> TenantsFile:
    """The content of a tenants file. Raises ConfigError: `FILE:LINE: FIELD: got …, expected …`."""
    import yaml  # a service's extra brings it, and a client's commands do without

    plain = _Plain()
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = {} if node is None else plain.data(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise ConfigError(f"{where}:{line}: is not YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{where}: is not YAML that can be read here: {type(error).__name__}") from error
    except _Unfit as error:
        raise ConfigError(f"{where}:{error.line}: {error}") from error
    try:
        content = TenantsFile.model_validate(data)
        of_file(content)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(each, plain.lines, where) for each in error.errors())) from None
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error
    return content


_COLLECTIONS: Final = frozenset({"tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"})


class _Unfit(Exception):
    """YAML of a kind that the file has no use for."""

    def __init__(self, node: yaml.Node, problem: str) -> None:
        super().__init__(problem)
        self.line = node.start_mark.line + 1


class _Plain:
    """YAML nodes as plain data, and the line of each place."""

    def __init__(self) -> None:
        self.lines: dict[tuple[str, ...], int] = {(): 1}
        self._seen: set[int] = set()

    def data(self, node: yaml.Node, path: tuple[str, ...] = ()) -> Any:
        """The node's data. Raises _Unfit for what would be taken in silence, or would take for ever."""
        import yaml

        if id(node) in self._seen:
            raise _Unfit(node, f"{_dotted(path)}: anchors and aliases are not taken")
        if not isinstance(node, yaml.ScalarNode) and node.tag not in _COLLECTIONS:
            raise _Unfit(node, f"{_dotted(path)}: the tag {node.tag!r} is not taken")
        self._seen.add(id(node))
        self.lines[path] = node.start_mark.line + 1
        if isinstance(node, yaml.SequenceNode):
            return [self.data(each, (*path, str(number))) for number, each in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            constructor: Any = yaml.constructor.SafeConstructor()
            try:
                return constructor.construct_object(node)
            except ValueError as error:  # a date that there is none of
                raise _Unfit(node, f"{_dotted(path)}: {error}") from error
            except (LookupError, AttributeError) as error:  # what PyYAML says to `!!bool maybe`
                raise _Unfit(node, f"{_dotted(path)}: is not what its tag {node.tag!r} says") from error
        found = {}
        for key, value in node.value:
            if not isinstance(key.value, str):
                raise _Unfit(key, f"{_dotted(path)}: a name in it is not a word")
            if key.value in found:
                raise _Unfit(key, f"{_dotted((*path, key.value))}: comes twice")
            found[key.value] = self.data(value, (*path, key.value))
        return found


def _dotted(path: tuple[str, ...]) -> str:
    return ".".join(path) or "the file"


def _explain(problem: Any, lines: Mapping[tuple[str, ...], int], where: str) -> str:
    path = tuple(str(step) for step in problem["loc"] if step != "[key]")
    known = path
    while known not in lines:  # a field that is missing has no line; what it is missing in has
        known = known[:-1]
    got = problem["input"]
    if isinstance(got, str | int | float) and "keys" not in path:  # what is kept of keys is nobody's to read
        said = f"got {str(got)[:80]!r}, expected: "
    else:
        said = "expected: "
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}:{lines[known]}: {_dotted(path)}: {said}{message}"


# --- a file that changes -----------------------------------------------------------------------------------

Stamp: TypeAlias = tuple[int, ...]


class TenantsWatch:
    """The tenants of a file as it is now: `hiprune.auth.Accounts`, replaced as a whole when it changes."""

    def __init__(self, path: Path) -> None:
        """Reads the file, with which `watch` keeps up from then on.

        Raises ConfigError when it is broken, or when others than its owner and group may read it.
        """
        self._path = path
        self._stamp, self._tenants = self._read()
        log.info("%d tenants in %s", len(self._tenants.by_name), path)

    def of_key(self, key: str) -> Tenant | None:
        """The tenant whose key this is."""
        return self._tenants.of_key(key)

    def named(self, name: str) -> Tenant | None:
        """The tenant of that name."""
        return self._tenants.named(name)

    async def watch(self, sleep: Callable[[float], Any] = asyncio.sleep) -> None:
        """Looks at the file now and then, for ever."""
        while True:
            await sleep(POLL_S)
            try:
                await asyncio.to_thread(self.look)
            except Exception:  # whatever it is, a key that is removed later must still go
                log.exception("the tenants stay as they were, as the file could not be looked at")

    def look(self) -> None:
        """Takes over what the file says now; keeps what it said last where that cannot be read. Blocks."""
        try:
            stamp = _stamp_of(self._path.stat())
        except OSError:
            stamp = ()
        if stamp == self._stamp:
            return
        self._stamp = stamp  # said once for each state of the file, good or bad
        try:
            self._stamp, self._tenants = self._read()
        except ConfigError as error:
            log.error("the tenants stay as they were, as the file cannot be used: %s", error)
        else:
            log.info("%d tenants in %s, which has changed", len(self._tenants.by_name), self._path)

    def _read(self) -> tuple[Stamp, Tenants]:
        """The file's tenants and its stamp from before it was read. Raises ConfigError."""
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                raw = file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise ConfigError(f"tenants: {self._path} cannot be read: {error.strerror}") from error
        if status.st_mode & _OTHERS:
            raise ConfigError(
                f"tenants: {self._path} has mode {stat.S_IMODE(status.st_mode):04o}, expected nothing for "
                f"others: chmod o= {self._path}"
            )
        if len(raw) > MAX_FILE_BYTES:
            raise ConfigError(f"tenants: {self._path} is larger than {MAX_FILE_BYTES} bytes")
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"tenants: {self._path} is not UTF-8, at byte {error.start}") from error
        return _stamp_of(status), of_file(parse(text, str(self._path)))


def _stamp_of(status: os.stat_result) -> Stamp:
    """What tells one state of a file from another: a write, a replacement, and who may read it, which decides
    whether it is taken."""
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino, status.st_mode
