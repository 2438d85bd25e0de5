"""Starts a machine's processes of one training by torchrun: `python -m model.agent <order>` (`model.machines.orders`).

Other than torchrun's own program it listens at one address, not at all of this machine, and it ends with the process
that started it, also while it waits for other machines.
"""

import json
import socket
import sys

from torch.distributed import TCPStore, run  # type: ignore[attr-defined] # documented, but its types are not exported

from model.end_with_parent import end_with_stdin

_LAST_SECONDS = 5.0  # to end by itself, as the processes that it has started do


def main() -> None:
    """Follow the order: a message of `model.machines.orders`, as JSON."""
    end_with_stdin(after=_LAST_SECONDS)
    order = json.loads(sys.argv[1])
    host, port = order.get("host", "127.0.0.1"), order.get("port", 0)
    store = None
    if order["rank"] == 0:
        store = _store_at(host, port)
        port = store.port
    run.main(
        [
            f"--nnodes={order['machines']}",
            f"--node-rank={order['rank']}",
            f"--nproc-per-node={order['processes']}",
            f"--master-addr={host}",
            f"--master-port={port}",
            "-m",
            "model.together",
            order["job"],
        ]
    )


def _store_at(host: str, port: int) -> TCPStore:
    """torchrun's store, made before it makes one itself, which would listen everywhere: stores of a port are one."""
    listening = socket.create_server((host, port))
    return TCPStore(
        host,
        listening.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=listening.detach(),
    )


if __name__ == "__main__":
    main()
