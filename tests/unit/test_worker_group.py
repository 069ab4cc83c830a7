from __future__ import annotations

import socket

import psutil
import pytest

from hpcft.worker.group import interface_of


def test_the_interface_that_carries_an_address_is_found() -> None:
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if entry.family == socket.AF_INET and not entry.address.startswith("127."):
                assert interface_of(entry.address) == name
    loopback = interface_of("127.0.0.1")
    assert loopback is not None
    assert interface_of("127.3.2.1") == loopback


def test_an_address_of_another_machine_is_on_no_interface() -> None:
    assert interface_of("192.0.2.1") is None
    assert interface_of("2001:db8::1") is None
    with pytest.raises(ValueError, match="does not appear to be"):
        interface_of("localhost")
