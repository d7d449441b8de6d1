"""`hiprune tenant`: accounts and keys in the tenants file, which running services read again by themselves.

A key is printed once, when it is made; the file holds a hash of it. The file is replaced as a whole, so that
no service ever sees half of it.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from pydantic import ValidationError
from rich.table import Table

from hiprune.auth import ANONYMOUS_TENANT
from hiprune.commands import options
from hiprune.commands.options import AsJson, complete_method, err, out
from hiprune.config import ConfigError
from hiprune.policies import METHODS
from hiprune.tenants import TenantsFile, new_key, of_file, parse

app = typer.Typer(no_args_is_help=True, help="Who may use the services: accounts, keys and limits.")
_HEADER: Final = """\
# The tenants of hiprune. Written by `hiprune tenant`, which keeps what stands here but for comments.
# Keys are here as salted hashes alone: a key that is lost is removed, and another one made.
"""

Data = dict[str, dict[str, Any]]

File = Annotated[Path, typer.Option(envvar="HIPRUNE_TENANTS", help="the tenants file")]
Name = Annotated[str, typer.Argument(help="lower-case letters, digits, . _ and -")]
Count = Annotated[int | None, typer.Option(min=1, max=2**31 - 1, show_default=False)]


@app.command()
def add(
    name: Name,
    file: File = Path("tenants.yaml"),
    requests_per_minute: Count = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(min=1, max=2**31 - 1, show_default=False, help="kept visual tokens")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, max=2**31 - 1, show_default=False, help="requests at a time")
    ] = None,
    max_image_bytes: Count = None,
    max_image_pixels: Count = None,
    method: Annotated[
        str | None,
        typer.Option(
            show_default=False,
            help=f"default method: {', '.join(METHODS)}",
            autocompletion=complete_method,
        ),
    ] = None,
    keep_ratio: Annotated[
        float | None, typer.Option(show_default=False, help="default share of tokens to keep")
    ] = None,
    keep_count: Annotated[
        int | None, typer.Option(show_default=False, help="default number of tokens to keep")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Adds a tenant and prints its first key. `anonymous` gets none: it bounds callers that bring none."""
    limits = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "concurrency": concurrency,
        "max_image_bytes": max_image_bytes,
        "max_image_pixels": max_image_pixels,
    }
    policy = {"method": method, "keep_ratio": keep_ratio, "keep_count": keep_count}
    key, entry = new_key(_today())
    keyless = name == ANONYMOUS_TENANT

    def change(tenants: Data) -> None:
        if name in tenants:
            raise ConfigError(f"{name!r} is there already: `hiprune tenant key {name}` makes it another key")
        tenants[name] = {
            "keys": [] if keyless else [entry.model_dump()],
            "limits": {name: value for name, value in limits.items() if value is not None},
            "policy": {name: value for name, value in policy.items() if value is not None},
        }

    _change(file, change, as_json=as_json)
    if as_json:
        options.print_json({"tenant": name, "key": "" if keyless else key})
    elif not keyless:
        _show(key)


@app.command()
def key(name: Name, file: File = Path("tenants.yaml"), as_json: AsJson = False) -> None:
    """Makes another key for a tenant: give it out, then remove the old one."""
    made, entry = new_key(_today())

    def change(tenants: Data) -> None:
        _of(tenants, name).setdefault("keys", []).append(entry.model_dump())

    _change(file, change, as_json=as_json)
    if as_json:
        options.print_json({"tenant": name, "key": made})
    else:
        _show(made)


@app.command()
def remove(
    name: Name,
    file: File = Path("tenants.yaml"),
    key_id: Annotated[
        str | None, typer.Option("--key", help="id of the one key to remove, as `list` shows it")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Removes a tenant, or one key of it. Services that run refuse it from about a second later on."""

    def change(tenants: Data) -> None:
        tenant = _of(tenants, name)
        if key_id is None:
            del tenants[name]
            return
        kept = [each for each in tenant.get("keys", []) if each["id"] != key_id]
        if len(kept) == len(tenant.get("keys", [])):
            raise ConfigError(f"{name!r} has no key {key_id!r}")
        tenant["keys"] = kept

    _change(file, change, as_json=as_json)
    if as_json:
        options.print_json({"tenant": name, "removed": "tenant" if key_id is None else key_id})


@app.command(name="list")
def list_(
    file: File = Path("tenants.yaml"),
    as_json: AsJson = False,
) -> None:
    """Shows tenants, ids of their keys, limits and default policies."""
    try:
        content = parse(file.read_text("utf-8"), str(file))
    except (OSError, UnicodeDecodeError, ConfigError, ImportError) as error:
        raise _failure(error, as_json=as_json) from error
    shown = {
        name: {
            "keys": {each.id: each.created.isoformat() if each.created else "" for each in entry.keys},
            "limits": entry.limits.model_dump(exclude_none=True),
            "policy": entry.policy.model_dump(exclude_none=True),
        }
        for name, entry in content.tenants.items()
    }
    if as_json:
        options.print_json(shown)
        return
    table = Table(box=None)
    for heading in ("tenant", "keys", "limits", "default policy"):
        table.add_column(heading, overflow="fold")
    for name, each in shown.items():
        table.add_row(
            name,
            "\n".join(f"{key_id} {created}" for key_id, created in each["keys"].items()),
            "\n".join(f"{limit}: {value}" for limit, value in each["limits"].items()),
            "\n".join(f"{field}: {value}" for field, value in each["policy"].items()),
        )
    out.print(table)


# --- the file ----------------------------------------------------------------------------------------------


def _change(file: Path, change: Callable[[Data], None], *, as_json: bool = False) -> None:
    """Changes the file, alone and at once. Ends the command for what is wrong, and then changes nothing."""
    path = file.resolve()  # a link stays one
    try:
        with _alone(path.parent):
            before = path.stat() if path.exists() else None
            content = parse(path.read_text("utf-8"), str(file)) if before else TenantsFile()
            tenants: Data = content.model_dump(exclude_defaults=True).get("tenants", {})
            change(tenants)
            _write(path, _checked(tenants), before)
    except (OSError, UnicodeDecodeError, ConfigError, ImportError) as error:
        raise _failure(error, as_json=as_json) from error


def _checked(tenants: Data) -> Data:
    """The same, once a service could read it. Raises ConfigError."""
    try:
        content = TenantsFile.model_validate({"tenants": tenants})
        of_file(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(step) for step in first["loc"][1:] if step != "[key]")
        raise ConfigError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from None
    checked: Data = content.model_dump(exclude_defaults=True).get("tenants", {})
    return checked


def _write(path: Path, tenants: Data, before: os.stat_result | None) -> None:
    """Replaces the file, whose owner and mode stay, but for what others may do. Raises OSError."""
    import yaml

    listed = {
        name: {part: list(value) if part == "keys" else value for part, value in tenant.items()}
        for name, tenant in tenants.items()
    }
    text = _HEADER + yaml.safe_dump({"tenants": listed}, sort_keys=False)
    handle, fresh = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            if before is not None:
                if (before.st_uid, before.st_gid) != (os.geteuid(), os.getegid()):
                    os.fchown(file.fileno(), before.st_uid, before.st_gid)
                os.fchmod(file.fileno(), stat.S_IMODE(before.st_mode) & ~stat.S_IRWXO)
            os.fsync(file.fileno())
        Path(fresh).replace(path)
    except BaseException:
        Path(fresh).unlink(missing_ok=True)
        raise


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps other commands out meanwhile: two that read, change and write would lose one's change."""
    import fcntl  # not on every system that clients run on

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _of(tenants: Data, name: str) -> dict[str, Any]:
    if name not in tenants:
        raise ConfigError(f"there is no tenant {name!r}")
    tenant = tenants[name]
    tenant["keys"] = list(tenant.get("keys", ()))
    return tenant


def _show(made: str) -> None:
    """The key alone on standard output, for scripts; what to know of it beside."""
    print(made)
    err.print("This key is shown now and never again; clients take it as HIPRUNE_KEY.", style="dim")


def _failure(error: Exception, *, as_json: bool) -> typer.Exit:
    if isinstance(error, ImportError):
        error = ConfigError(
            "tenants need PyYAML: install hiprune with the extra of a service, as hiprune[llm]"
        )
    if as_json:
        options.print_error(str(error), reason="TENANTS_FILE")
    else:
        err.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
    return typer.Exit(1)


def _today() -> Any:
    return datetime.now(UTC).date()
