"""Ports for servers that the tests start."""

from __future__ import annotations

import contextlib
import random
import socket

# Below the ports from which the kernel takes those of outgoing connections (32768 and up): one of
# these, once seen free, isn't taken by a client of another test before our server listens on it.
_RANGE = range(10_000, 30_000)


def free_ports(count: int) -> list[int]:
    ports: list[int] = []
    for port in random.SystemRandom().sample(_RANGE, len(_RANGE)):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise OSError(f"found {len(ports)} free ports, not {count}")


def free_port() -> int:
    return free_ports(1)[0]
