"""This machine on the network: its address, the interface that has it, a free port.

Deliberately not here: talking to anybody.
"""

from __future__ import annotations

import socket

import psutil


def address_towards(host: str) -> str:
    """This machine's address on the way to another; nothing is sent."""
    family, _, _, _, place = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(place)
        return probe.getsockname()[0]


def own_address() -> str:
    """The address that this machine's name stands for, or the one of its default route where that is loopback."""
    try:
        address = socket.gethostbyname(socket.gethostname())
        # Debian gives a machine's own name 127.0.1.1.
        return address_towards("192.0.2.1") if address.startswith("127.") else address
    except OSError:  # no name, no route
        return "127.0.0.1"


def interface_of(address: str) -> str | None:
    """The name of the interface that has an address; None where none has."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address.split("%")[0] == address for found in addresses):
            return name
    return None


def free_port(address: str) -> int:
    """A port that nobody listens on at an address of this machine; the next moment somebody may."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]
