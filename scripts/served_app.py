"""An application as a thread of this process, at a real address."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from scripts.label_studio_server import HOST, free_port


@contextmanager
def served(app: FastAPI, *, port: int | None = None) -> Iterator[str]:
    """The address of the application while the block runs; its CPU time is this process's."""
    port = port or free_port()
    server = uvicorn.Server(uvicorn.Config(app, host=HOST, port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.02)
        yield f"http://{HOST}:{port}"
    finally:
        server.should_exit = True
        thread.join()
