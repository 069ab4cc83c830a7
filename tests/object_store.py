"""An object store to test against: moto's S3, in a process of its own on loopback, spoken to over HTTP."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.request import Request, urlopen

from hpcft.bucket import Bucket
from hpcft.places import Place

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "AKIATESTONLY", "AWS_SECRET_ACCESS_KEY": "not-a-secret-of-anybody"}

_PATIENCE = 60.0
_REQUEST = re.compile(r'"(?:\x1b\[\d+m)*([A-Z]+) /([^ ?]+)(\S*) HTTP/1.1(?:\x1b\[\d+m)*" (\d+)')


@dataclass(frozen=True)
class Store:
    process: subprocess.Popen[bytes]
    endpoint: str
    log: Path

    @classmethod
    @contextmanager
    def start(cls, directory: Path) -> Iterator[Self]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        log = directory / "requests.log"
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            deadline = time.monotonic() + _PATIENCE
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except OSError:
                    assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                    time.sleep(0.05)
            yield cls(process, f"http://127.0.0.1:{port}", log)
        finally:
            process.kill()
            process.wait()

    def place(self, bucket: str, prefix: str = "home") -> Place:
        """A new bucket."""
        urlopen(Request(f"{self.endpoint}/{bucket}", method="PUT")).close()
        return Place(f"s3://{bucket}/{prefix}", self.endpoint, "us-east-1")

    def put(self, place: Place) -> list[str]:
        """Keys of the objects that were written to a place, in the order in which they came, each time."""
        bucket, _, prefix = place.url.removeprefix("s3://").partition("/")
        found = _REQUEST.findall(self.log.read_text(errors="replace"))
        start = f"{bucket}/{prefix}/"
        return [path.removeprefix(start) for verb, path, _, _ in found if verb == "PUT" and path.startswith(start)]

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """It accepts connections, and answers nothing."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)


def keys(bucket: Bucket, prefix: str = "") -> list[str]:
    return [each.key for each in bucket.objects(prefix)]


def damage(bucket: Bucket, key: str) -> None:
    """One flipped bit."""
    data = bytearray(bucket.get(key)[0])
    data[len(data) // 2] ^= 1
    bucket.put(key, data)
