"""torchrun with a longer time for the remaining processes to end after one is lost, for slow computers.

Its own 30 seconds before it kills them are not an option of the command: they are the default of two methods. Its
processes are forked where it was itself. See test_distributed.py.
"""

import signal

import programs
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import PContext
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
from torch.distributed.run import main

PATIENCE = 120  # seconds; a process that is killed after them has not noticed that another is gone


def started(*, args: tuple[str, ...], **options: object) -> object:
    return programs.start(args, **{name: value for name, value in options.items() if value is not None})


if __name__ == "__main__":
    LocalElasticAgent._shutdown.__defaults__ = (signal.SIGTERM, PATIENCE)
    PContext.close.__defaults__ = (None, PATIENCE)  # when a process has failed
    programs.inherit_server()
    subprocess_handler.Popen = started
    main()
