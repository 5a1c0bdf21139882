"""The conformance kit: what a plugin's author runs over a plugin, and what our own tests run over every installed one.

    from arbor_core.testing import check_trainer

    def test_my_trainer_conforms():
        check_trainer("mine", rows=ROWS, model="mock/tiny")

Each check raises an AssertionError that says what was expected. None needs a server; `check_backend` and
`check_policies` start engines, `check_executor` attempts.
"""

from .devices import check_allocator, check_scheduler
from .engine import check_backend, check_policies
from .executor import check_executor
from .hardware import device
from .job_directory import JobDirectory
from .launcher import check_launcher
from .trainer import check_trainer

__all__ = [
    "JobDirectory",
    "check_allocator",
    "check_backend",
    "check_executor",
    "check_launcher",
    "check_policies",
    "check_scheduler",
    "check_trainer",
    "device",
]
