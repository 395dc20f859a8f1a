"""A bad line on loopback: delay, little bandwidth, stalls, and a cut.

Kernels without the `netem` queue cannot drop packets on loopback; what TCP makes of a lost packet, a stall of a
retransmission time-out, is what this relay gives to one block in twenty.
"""

from __future__ import annotations

import random
import socket
import threading
import time
from contextlib import suppress

_BLOCK = 8192


class BadLine:
    """Forwards TCP connections to another port of loopback, badly. Ends with `close`."""

    def __init__(
        self, target: int, *, delay_s: float = 0.1, bytes_per_s: float = 250_000, loss: float = 0.05, seed: int = 0
    ) -> None:
        """Opens a port.

        Args:
            target: Port that is forwarded to.
            delay_s: Of every block, each way.
            bytes_per_s: All connections of one direction share it; 250,000 are 2 Mbit/s.
            loss: Share of blocks that stall for 0.2 to 1 s.
        """
        self._target, self._delay_s, self._rate, self._loss = target, delay_s, bytes_per_s, loss
        self._random = random.Random(seed)
        self._free_at = {"up": 0.0, "down": 0.0}
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._cut = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.bytes = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Breaks every connection and takes no new one."""
        self._cut.set()
        with self._lock:
            broken, self._open = self._open, set()
        for end in broken:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self._cut.clear()

    def close(self) -> None:
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self._cut.is_set():
                near.close()
                continue
            try:
                far = socket.create_connection(("127.0.0.1", self._target), timeout=5)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            with self._lock:
                self._open |= {near, far}
            for a, b, way in ((near, far, "up"), (far, near, "down")):
                threading.Thread(target=self._pump, args=(a, b, way), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        with suppress(OSError):
            while block := source.recv(_BLOCK):
                time.sleep(self._wait(way, len(block)))
                sink.sendall(block)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        with self._lock:
            self._open -= {source, sink}

    def _wait(self, way: str, size: int) -> float:
        with self._lock:
            self.bytes += size
            now = time.monotonic()
            begin = max(now, self._free_at[way])
            self._free_at[way] = begin + size / self._rate
            stall = self._random.uniform(0.2, 1.0) if self._random.random() < self._loss else 0.0
            # the delay is paid once for blocks that follow each other: the line holds several at a time
            return begin - now + stall + (self._delay_s if begin == now else 0.0)
