"""``python killed.py METHOD STEP OVERRIDE...``: train.py, and SIGKILL in a method of the joint stages at that step."""

import os
import signal
import sys

from megactx.framework import app
from megactx.stages.alternating import AlternatingStage
from megactx.stages.end_to_end import EndToEndStage

method, step = sys.argv[1], int(sys.argv[2])


def dies(original):
    def wrapped(self, *arguments):
        if self.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *arguments)

    return wrapped


for stage in (AlternatingStage, EndToEndStage):
    if hasattr(stage, method):
        setattr(stage, method, dies(getattr(stage, method)))
sys.exit(app.run(sys.argv[3:]))
