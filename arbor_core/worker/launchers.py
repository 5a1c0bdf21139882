"""Commands that start the ranks of an attempt: torchrun, accelerate."""

from __future__ import annotations

from pathlib import Path

from arbor_core.types import AttemptOrder

SAME_MACHINE = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
"""Where the ranks of a job speak to one another; other machines have nothing to say there."""


def ranks_command(order: AttemptOrder, ranks: int, accelerate_config: Path | None) -> tuple[str, ...]:
    """One process per device: by accelerate where the operator configured it, else by torchrun."""
    launch: tuple[str, ...]
    if accelerate_config:
        launch = (
            "accelerate.commands.launch",
            "--config_file",
            str(accelerate_config.absolute()),
            "--num_processes",
            str(ranks),
        )
    else:
        launch = ("torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks))
    return (order.python, "-m", *launch, "-m", "arbor_core.worker.main", ".")  # in the attempt's directory
