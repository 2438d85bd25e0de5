"""An S3 of the tests' own: moto's server as a process, with a bucket for each test."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import boto3
import httpx

from scripts.label_studio_server import HOST, free_port

_START_SECONDS = 60.0
SECRET = "the-secret-of-the-store"


@dataclass
class S3:
    """A running server; what it holds is gone when it ends."""

    port: int = field(default_factory=free_port)
    numbers: Iterator[int] = field(default_factory=lambda: count(1))

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which the AWS libraries find it."""
        return {
            "AWS_ENDPOINT_URL": f"http://{HOST}:{self.port}",
            "AWS_ACCESS_KEY_ID": "tests",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def new_bucket(self) -> str:
        """The name of an empty bucket."""
        name = f"bucket{next(self.numbers)}"
        self._client().create_bucket(Bucket=name)
        return name

    def refuse(self, bucket: str, action: str) -> None:
        """From now on nobody may do this ("s3:DeleteObject") in a bucket."""
        denied = {"Effect": "Deny", "Principal": "*", "Action": action, "Resource": f"arn:aws:s3:::{bucket}/*"}
        policy = {"Version": "2012-10-17", "Statement": [denied]}
        self._client().put_bucket_policy(Bucket=bucket, Policy=json.dumps(policy))

    def keys(self, bucket: str) -> set[str]:
        """Of the objects in a bucket that holds at most a thousand."""
        answer = self._client().list_objects_v2(Bucket=bucket)
        return {found["Key"] for found in answer.get("Contents", [])}

    def _client(self):  # type: ignore[no-untyped-def] # boto3 has no types
        access = {"aws_access_key_id": "tests", "aws_secret_access_key": SECRET, "region_name": "us-east-1"}
        return boto3.client("s3", endpoint_url=self.environment["AWS_ENDPOINT_URL"], **access)


@contextmanager
def running_s3(folder: Path) -> Iterator[S3]:
    """A server of its own, whose log lies in a folder."""
    server = S3()
    with (folder / "s3.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", HOST, "-p", str(server.port)], stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not _answers(server):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the S3 server did not start:\n{(folder / 's3.log').read_text()}")
            time.sleep(0.1)
        yield server
    finally:
        process.terminate()
        process.wait()


def _answers(server: S3) -> bool:
    try:
        return httpx.get(server.environment["AWS_ENDPOINT_URL"], timeout=2.0).status_code < 500
    except httpx.TransportError:
        return False
