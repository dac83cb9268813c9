"""No way out of this machine, for every Python whose PYTHONPATH has this folder, and what tried to find one.

Each try is a line in the file that ``TRIED_FILE`` names. What native code does without Python's sockets is not seen.
"""

import errno
import ipaddress
import os
import sys
from collections.abc import Callable
from pathlib import Path

TRIED_FILE = "DISTILL_TRIED_FILE"
HOST_OF = {  # what Python tells of a call (docs.python.org/3/library/audit_events.html), without the socket
    "socket.connect": lambda socket, address: address,
    "socket.sendto": lambda socket, address: address,
    "socket.sendmsg": lambda socket, address: address,
    "socket.getaddrinfo": lambda host, *_: host,
    "socket.gethostbyname": lambda host: host,
    "socket.gethostbyaddr": lambda host: host,
}


def refuse(tell: Callable[[str], None]) -> None:
    """Raise OSError wherever this process looks up or speaks to another machine, from now on, and tell of each."""

    def hook(event, arguments):
        if event in HOST_OF and _elsewhere(address := HOST_OF[event](*arguments)):
            tell(f"{event} {address!r}")
            raise OSError(errno.ENETUNREACH, "the tests allow no network")

    sys.addaudithook(hook)


def _elsewhere(address) -> bool:
    host = address[0] if isinstance(address, tuple) else address
    if host is None or isinstance(address, (str, bytes)) and os.sep in os.fsdecode(address):
        return False  # any address of this machine; a socket that is a file
    try:
        ip = ipaddress.ip_address(os.fsdecode(host))
    except ValueError:
        return os.fsdecode(host) not in ("", "localhost")
    return not (ip.is_loopback or ip.is_unspecified)


if path := os.environ.get(TRIED_FILE):

    def _write(line: str) -> None:
        with Path(path).open("a") as file:
            file.write(line + "\n")

    refuse(_write)
