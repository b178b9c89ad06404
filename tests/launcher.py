"""torchrun with a longer time for the remaining processes to end after one is lost, for slow computers.

Its own 30 seconds before it kills them are not an option of the command. See test_distributed.py.
"""

import signal

from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.run import main

PATIENCE = 600  # seconds; a process that is killed after them has not noticed that another is gone

if __name__ == "__main__":
    LocalElasticAgent._shutdown.__defaults__ = (signal.SIGTERM, PATIENCE)
    main()
