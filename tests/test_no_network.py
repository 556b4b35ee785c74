"""The tests reach nothing but this machine, in their own process and in the processes they start."""

import socket
import subprocess
import sys

import pytest

OUTSIDE = ("192.0.2.1", 443)  # TEST-NET-1, RFC 5737: belongs to nobody


def test_f8_no_connection_leaves_the_test_process():
    with socket.socket() as client, pytest.raises(PermissionError, match="no network"):
        client.connect(OUTSIDE)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client, pytest.raises(PermissionError, match="no network"):
        client.sendto(b"", OUTSIDE)
    with pytest.raises(socket.gaierror, match="no network"):
        socket.create_connection(("huggingface.co", 443))


def test_f8_no_connection_leaves_a_child_process():
    code = f"import socket; socket.socket().connect({OUTSIDE})"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert child.returncode != 0
    assert "tests use no network" in child.stderr


def test_loopback_stays_open():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        connection, _ = server.accept()
        connection.close()
