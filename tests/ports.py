"""A port for a server that a test starts."""

import random
import socket


def free_port() -> int:
    """Returns a port of this machine that nobody listens on.

    It is below those that the system gives to connections by itself, of which any program could get it before the
    server has started. Tests seed `random`, and several run side by side: the draw is the system's.
    """
    draw = random.SystemRandom()
    for _ in range(100):
        port = draw.randrange(15000, 32000)
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no free port found between 15000 and 32000")
