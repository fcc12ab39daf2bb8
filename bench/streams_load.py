"""The load for `streams.py`: a target that tunnels lead to, and what a client measures through them. No libmesh here.

python bench/streams_load.py        serve the target; prints its port
"""

from __future__ import annotations

import select
import socket
import statistics
import time
from collections.abc import Callable

REQUEST = b"GET / HTTP/1.1\r\nHost: bench\r\nAccept: */*\r\n\r\n"
RESPONSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 64\r\n\r\n" + b"x" * 64


def serve() -> None:
    """One thread, epoll. The first byte of a connection says what it is: S counts, E echoes, G is HTTP."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    print(listener.getsockname()[1], flush=True)
    poll = select.epoll()
    poll.register(listener, select.EPOLLIN)
    connections: dict[int, list] = {}
    buffer = bytearray(1 << 20)
    while True:
        for number, _ in poll.poll():
            if number == listener.fileno():
                sock, _ = listener.accept()
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connections[sock.fileno()] = [sock, b"", 0]
                poll.register(sock, select.EPOLLIN)
                continue
            entry = connections[number]
            sock, mode, total = entry
            try:
                count = sock.recv_into(buffer)
                if count and not mode:
                    entry[1] = mode = bytes(buffer[:1])
                    if mode == b"E" and count > 1:
                        sock.sendall(buffer[1:count])
                        continue
                if not count:
                    if mode == b"S":
                        sock.sendall(total.to_bytes(8, "big"))
                    raise ConnectionResetError
                if mode == b"S":
                    entry[2] += count
                elif (mode == b"E" and count > 1) or (mode == b"E" and total):
                    sock.sendall(buffer[:count])
                elif mode == b"G":
                    sock.sendall(RESPONSE * buffer[:count].count(b"\r\n\r\n"))
                entry[2] += mode == b"E"
            except OSError:
                poll.unregister(number)
                del connections[number]
                sock.close()


def connect(port: int) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port), timeout=30)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def throughput(port: int, seconds: float) -> float:
    """MiB/s of one connection, up to the moment when the target has counted the last byte."""
    block = bytes(1 << 18)
    with connect(port) as sock:
        sock.sendall(b"S")
        start = time.perf_counter()
        total = 1
        while time.perf_counter() - start < seconds:
            sock.sendall(block)
            total += len(block)
        sock.shutdown(socket.SHUT_WR)
        counted = int.from_bytes(sock.recv(8), "big")
        took = time.perf_counter() - start
    if counted != total:
        raise RuntimeError(f"{total} bytes sent, {counted} arrived")
    return total / took / 2**20


def ping_pong(port: int, seconds: float) -> float:
    """Median µs for 64 bytes there and back."""
    waits = []
    with connect(port) as sock:
        sock.sendall(b"E" + bytes(64))
        receive(sock, 64)
        end = time.perf_counter() + seconds
        while (start := time.perf_counter()) < end:
            sock.sendall(bytes(64))
            receive(sock, 64)
            waits.append(time.perf_counter() - start)
    return statistics.median(waits) * 1e6


def requests(port: int, seconds: float, connections: int = 32) -> float:
    """HTTP requests a second over keep-alive connections."""
    poll = select.epoll()
    socks = {}
    for _ in range(connections):
        sock = connect(port)
        socks[sock.fileno()] = [sock, 0]
        poll.register(sock, select.EPOLLIN)
    for sock, _ in socks.values():
        sock.sendall(REQUEST)
    done = 0
    start = time.perf_counter()
    while (now := time.perf_counter()) - start < seconds:
        for number, _ in poll.poll(5):
            entry = socks[number]
            entry[1] += len(entry[0].recv(65536))
            if entry[1] >= len(RESPONSE):
                entry[1] = 0
                done += 1
                entry[0].sendall(REQUEST)
    for sock, _ in socks.values():
        sock.close()
    return done / (now - start)


def connects(port: int, seconds: float) -> float:
    """Connections a second, each with a byte there and back, one after the other."""
    done = 0
    start = time.perf_counter()
    while (now := time.perf_counter()) - start < seconds:
        with connect(port) as sock:
            sock.sendall(b"Ex")
            receive(sock, 1)
        done += 1
    return done / (now - start)


def receive(sock: socket.socket, count: int) -> None:
    while count:
        data = sock.recv(count)
        if not data:
            raise ConnectionError("the tunnel closed the connection")
        count -= len(data)


MEASURES: dict[str, tuple[Callable[[int, float], float], str]] = {
    "MiB/s": (throughput, "higher"),
    "ping-pong µs": (ping_pong, "lower"),
    "HTTP req/s": (requests, "higher"),
    "connections/s": (connects, "higher"),
}

if __name__ == "__main__":
    serve()
