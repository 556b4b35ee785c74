"""Blocks connections that leave this machine, in every Python process that has this folder on PYTHONPATH.

Python imports a module of this name at start-up; conftest.py imports it for the tests' own process.
"""

import ipaddress
import socket


def _stays_here(family: int, address: object) -> bool:
    if family == socket.AF_UNIX:
        return True
    host = address[0] if isinstance(address, tuple) else address
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(str(host).partition("%")[0]).is_loopback
    except ValueError:  # any other name could be anywhere
        return False


def _guarded(method):
    def connect(self, *arguments):
        if not _stays_here(
            self.family, arguments[-1]
        ):  # the address comes last: connect(address), sendto(data, address)
            raise PermissionError(f"a test tried to reach {arguments[-1]!r}: tests use no network")
        return method(self, *arguments)

    return connect


def _looked_up(getaddrinfo):
    def lookup(host, *arguments, **options):
        if host is not None and not _stays_here(socket.AF_INET, (host.decode() if isinstance(host, bytes) else host,)):
            raise socket.gaierror(socket.EAI_NONAME, f"a test looked up {host!r}: tests use no network")
        return getaddrinfo(host, *arguments, **options)

    return lookup


if not getattr(socket, "stays_on_this_machine", False):
    for _name in ("connect", "connect_ex", "sendto"):
        setattr(socket.socket, _name, _guarded(getattr(socket.socket, _name)))
    socket.getaddrinfo = _looked_up(socket.getaddrinfo)
    socket.stays_on_this_machine = True
