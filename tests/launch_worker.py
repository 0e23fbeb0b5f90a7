"""A rank of tests/test_launch.py: joins the launch, asks at each step whether to stop, and prints its end."""

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from mapet_ds.errors import ConfigError
from mapet_ds.launch import StopRequest, init_distributed


def main(run_dir: Path) -> int:
    try:
        ranks = init_distributed()
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    total = torch.ones(1, device=ranks.device)
    dist.all_reduce(total)
    stop = StopRequest(run_dir, ranks)
    step = 0
    while not stop.agreed() and step < 600:
        step += 1
        if step == 5:  # both ranks listen to signals and have passed several steps
            (run_dir / f"pid{ranks.rank}").write_text(str(os.getpid()))
        time.sleep(0.1)
    (run_dir / f"end{ranks.rank}").write_text(f"{ranks.local_rank} {ranks.world_size} {int(total)} {step}")
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[-1])))
