"""torchrun, which gives the processes that a lost one leaves as long to end as they need on a slow machine.

Its own 30 seconds before it kills them are no option of the command. See test_distributed.py.
"""

import signal

from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.run import main

PATIENCE = 600  # seconds; a process that is killed after them has not noticed that another is gone

if __name__ == "__main__":
    LocalElasticAgent._shutdown.__defaults__ = (signal.SIGTERM, PATIENCE)
    main()
