"""The watch that every test and every ComfyUI of the tests stands under."""

import socket
import subprocess
import sys

import pytest

from .. import comfyui

pytestmark = pytest.mark.slow

ELSEWHERE = "192.0.2.1"  # for documentation (RFC 5737), so that nothing would be there
CALLS = {
    "connect": f"socket.create_connection(({ELSEWHERE!r}, 80), 1)",
    "lookup": "socket.getaddrinfo('example.org', 443)",
    "old lookup": "socket.gethostbyname('example.org')",
    "datagram": f"socket.socket(type=socket.SOCK_DGRAM).sendto(b'', ({ELSEWHERE!r}, 53))",
    "http": f"__import__('urllib.request').request.urlopen('http://{ELSEWHERE}/', timeout=1)",
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_python_of_comfyui_reaches_no_other_machine_and_tells_of_the_try(call, tmp_path):
    tried = tmp_path / "tried.log"
    done = subprocess.run([sys.executable, "-c", f"import socket; {call}"], capture_output=True, text=True,
                          env=comfyui.offline_environment(tried))  # fmt: skip
    assert "the tests allow no network" in done.stderr
    assert len(tried.read_text().splitlines()) == 1


def test_so_does_the_process_of_the_tests(tried):
    with pytest.raises(OSError, match="the tests allow no network"):
        socket.create_connection((ELSEWHERE, 80), 1)
    assert len(tried) == 1
    tried.clear()


def test_this_machine_answers():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(("localhost", server.getsockname()[1]), 5):
        pass
