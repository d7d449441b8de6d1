"""Who may call. Until tenants are configured: this machine only, unless anonymous callers are allowed."""

from __future__ import annotations

import ipaddress
from typing import Final

ANONYMOUS_TENANT: Final = "anonymous"
"""The tenant of every caller where no tenants are configured."""


def is_private(listen: str) -> bool:
    """Whether an address can only be reached from this machine: a Unix socket or a loopback address."""
    if listen.startswith(("unix:", "unix-abstract:")):
        return True
    host = listen.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
