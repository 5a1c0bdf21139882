"""torchrun for the ranks of one machine: what they meet at listens on loopback and nowhere else.

`python -m arbor_core.worker.torchrun OPTIONS -m MODULE ...`, with torchrun's own options. `torchrun --standalone` opens
stores that listen on all interfaces and authenticate nobody. Here there is one, on a socket that is bound to loopback
already. The agent uses it, and the ranks are told its address and not to open any (MASTER_ADDR, MASTER_PORT and
TORCHELASTIC_USE_AGENT_STORE), so that `init_process_group()` finds it, whoever calls it: a trainer, accelerate,
DeepSpeed.

It runs in the interpreter that has a trainer's libraries. The core does without torch: it is found by its name.
"""

from __future__ import annotations

import socket
import sys
from importlib import import_module
from typing import Any

LOOPBACK = "127.0.0.1"
BACKEND = "loopback"
"""What `--rdzv-backend` calls the rendezvous."""


class LoopbackRendezvous:
    """Where the agent and its ranks meet: torch's `RendezvousHandler`, for one agent.

    Args:
        run_id: Of the agent, as torchrun calls it.
    """

    use_agent_store = True
    """The ranks open no store of their own."""

    def __init__(self, run_id: str) -> None:
        self.run_id, self.closed = run_id, False
        distributed = import_module("torch.distributed")
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
            listener.bind((LOOPBACK, 0))
            listener.listen()
            self.port: int = listener.getsockname()[1]
            self.store = distributed.TCPStore(
                LOOPBACK,
                self.port,
                is_master=True,
                wait_for_workers=False,
                multi_tenant=False,
                master_listen_fd=listener.detach(),
            )

    def get_backend(self) -> str:
        return BACKEND

    def get_run_id(self) -> str:
        return self.run_id

    def next_rendezvous(self) -> Any:
        """Meet: the agent is the only one."""
        distributed, rendezvous = import_module("torch.distributed"), import_module(RENDEZVOUS)
        agents = distributed.PrefixStore("agent", self.store)  # its keys and the ranks' must not be mistaken
        address = rendezvous.RendezvousStoreInfo(LOOPBACK, self.port)
        return rendezvous.RendezvousInfo(agents, 0, 1, address)

    def num_nodes_waiting(self) -> int:
        return 0

    def is_closed(self) -> bool:
        return self.closed

    def set_closed(self) -> None:
        self.closed = True

    def shutdown(self) -> bool:
        self.closed = True
        return True


RENDEZVOUS = "torch.distributed.elastic.rendezvous"


def main(arguments: list[str]) -> None:
    """Run torchrun with this rendezvous."""
    registry = import_module(RENDEZVOUS).rendezvous_handler_registry
    registry.register(BACKEND, lambda parameters: LoopbackRendezvous(parameters.run_id))
    import_module("torch.distributed.run").main([f"--rdzv-backend={BACKEND}", *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
