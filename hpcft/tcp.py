"""TCP sockets as everything in hpcft uses them: numeric addresses, one interface, a known patience with silence."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass
from typing import Any, Final

from hpcft.errors import UnusableError

Address = tuple[str, int]
"""Numeric host and port."""

BACKLOG: Final = 4096
"""All agents dial a new leader at once."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long the kernel keeps a silent connection, seconds."""

    idle: int
    interval: int
    probes: int
    unacknowledged: int


def set_patience(connection: Any, patience: Patience) -> None:
    """For a connected or connecting socket, or what an event loop shows of one; also sends small writes at once."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, patience.idle)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, patience.interval)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, patience.probes)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, patience.unacknowledged * 1000)


def numeric(address: Address) -> tuple[int, Any]:
    """Family and socket address. Names are not looked up: that blocks, and may find an address nobody meant.

    Raises:
        UnusableError: not a numeric address.
    """
    host, port = address
    try:
        found = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
        )
    except (socket.gaierror, UnicodeError) as error:
        raise UnusableError(f"{host!r} is not a numeric address", "give it as 10.0.0.1 or fd00::1") from error
    return found[0][0], found[0][4]


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on this one address (port 0: any free one).

    Raises:
        UnusableError: not a numeric address, one that means every interface, not of this machine, or port taken.
    """
    family, sockaddr = numeric((host, port))
    if ipaddress.ip_address(sockaddr[0].partition("%")[0]).is_unspecified:
        raise UnusableError(f"{host} means every interface of this machine", "give the address of one interface")
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        # Not SO_REUSEPORT: another process of the machine could then share the port and take connections.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(sockaddr)
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        raise UnusableError(
            f"cannot listen on {host} port {port}: {error.strerror}",
            "choose another port, or 0 for any free one; the address must belong to this machine",
        ) from error
    return listening


def named(address: Address) -> str:
    return f"{address[0]} port {address[1]}"
