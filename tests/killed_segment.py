"""segment.py that is killed when step 6 is due and the checkpoint of step 4 is on the disk."""

import os
import signal
import sys

from mapet_ds.run import Run, run
from mapet_ds.segmentation.task import Segmentation
from mapet_ds.training.command_line import SEGMENTATION, parse_command_line

train_step = Run.train_step


def killed_step(self):
    if self.step == 6:
        self.settle()
        os.kill(os.getpid(), signal.SIGKILL)
    train_step(self)


if __name__ == "__main__":
    Run.train_step = killed_step
    sys.exit(run(Segmentation, *parse_command_line(sys.argv[1:], None, SEGMENTATION)))
