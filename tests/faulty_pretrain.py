"""pretrain.py with a fault in it, named by the variable FAULT = "KIND RANK FIRST LAST".

In steps FIRST .. LAST (counted from 0) rank RANK has, by KIND: nan, a loss that is none; jump, a loss a
hundred times as large; stuck, images that never come; slow, a disk that takes ten seconds for the
checkpoint; full, one without room for it; busy, one on which each fsync of the checkpoint takes four.
"""

import errno
import os
import sys
import time

from mapet_ds.data.loader import Loader
from mapet_ds.objectives.mapet import MaPeT
from mapet_ds.pretrain import main
from mapet_ds.run import Run
from mapet_ds.training import checkpoint

KIND, *NUMBERS = os.environ["FAULT"].split()
RANK, FIRST, LAST = map(int, NUMBERS)
train_step, forward, next_batch, save = Run.train_step, MaPeT.forward, Loader.__next__, checkpoint.save
FACTORS = {"nan": float("nan"), "jump": 100.0}


def is_due(step):
    return int(os.environ.get("RANK", "0")) == RANK and FIRST <= step <= LAST


def noting_step(self):
    self.task.objective.step = self.step  # a draw is made ahead of its step and can't tell it
    train_step(self)


def faulty_forward(self, *arguments):
    loss = forward(self, *arguments)
    return loss._replace(loss=loss.loss * FACTORS[KIND]) if is_due(self.step) else loss


def stuck_next(self):
    self.asked = getattr(self, "asked", -1) + 1
    if is_due(self.asked):
        time.sleep(1000)
    return next_batch(self)


def slow_save(folder, run, *more):
    if is_due(run["step"]):
        time.sleep(10)
    return save(folder, run, *more)


def save_on_a_busy_disk(folder, run, *more):
    if is_due(run["step"]):
        os.fsync = lambda descriptor: time.sleep(4)
    return save(folder, run, *more)


def failing_save(folder, run, *more):
    if is_due(run["step"]):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return save(folder, run, *more)


if __name__ == "__main__":
    if KIND == "stuck":
        Loader.__next__ = stuck_next
    elif KIND == "slow":
        checkpoint.save = slow_save
    elif KIND == "busy":
        checkpoint.save = save_on_a_busy_disk
    elif KIND == "full":
        checkpoint.save = failing_save
    else:
        Run.train_step, MaPeT.forward = noting_step, faulty_forward
    sys.exit(main())
