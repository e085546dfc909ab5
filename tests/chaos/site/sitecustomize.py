"""Python runs this first in every process that has this directory on its path: the doom of those
that a test does not start itself, Ray's workers and a job's driver.
"""

import json
import os
from pathlib import Path

if "CHAOS_WORKERS" in os.environ:
    from tests.chaos.doom import Doom, Steps, StepsOfWorkers

    StepsOfWorkers(Path(os.environ["CHAOS_WORKERS"])).install()
    if "CHAOS_DRIVER" in os.environ:
        Steps(Doom(**json.loads(os.environ["CHAOS_DRIVER"]))).install()
