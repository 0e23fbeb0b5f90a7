"""A run that stands still names the rank that holds it up, and ends; ranks whose launcher is gone don't outlive it.

Collectives wait for each other for half an hour, in silence, and the main thread can't look around meanwhile. So each rank
has a thread that says, every few seconds, in the launch's own key-value store, how far its rank has come.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from mapet_ds.launch import Ranks, has_ended, launchers

SAVING = "saving a checkpoint"
"""May take as long as it takes: the others wait, and rank 0's disk is not the network."""
ORPHAN_SECONDS = 15
"""Without progress, after the launcher's death; ranks that still make progress stop by themselves (launch.StopRequest)."""
STORE_TIMEOUT = timedelta(seconds=20)
EXIT_CODE = 3


class Watchdog:
    """Watches over this rank from now until `close`. Every rank must build one, and report the same activities.

    limit: seconds without progress after which the run is taken for hung. It ends the process with EXIT_CODE, what it knows
    and where the threads stand on standard error; the launcher then ends the other ranks.
    """

    def __init__(self, limit: float, ranks: Ranks) -> None:
        self._limit, self._ranks, self._launchers = limit, ranks, launchers()
        self._interval = min(5.0, limit / 4)
        self._progress, self._doing, self._since, self._beats = 0, "starting", time.monotonic(), 0
        self._store = None
        if ranks.world_size > 1:  # a connection of its own: the main thread's may be waiting for an answer
            address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            self._store = dist.TCPStore(*address, is_master=False, timeout=STORE_TIMEOUT, wait_for_workers=False)
            self._beat()
            dist.barrier(ranks.control)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def doing(self, activity: str) -> None:
        """Note that the last activity is over and this one begins. No host wait."""
        self._progress, self._doing, self._since = self._progress + 1, activity, time.monotonic()

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        self._thread.join()

    def _beat(self) -> None:
        self._beats += 1
        beat = [self._beats, self._progress, self._doing, time.monotonic() - self._since, socket.gethostname(), os.getpid()]
        self._store.set(f"watchdog/{self._ranks.rank}", json.dumps(beat))

    def _watch(self) -> None:
        while not self._closed.wait(self._interval):
            still = time.monotonic() - self._since
            try:
                if self._store:
                    self._beat()
                orphaned = any(map(has_ended, self._launchers))
                if self._doing == SAVING or still < (min(self._limit, ORPHAN_SECONDS) if orphaned else self._limit):
                    continue
                found = "its launcher is gone" if orphaned else self._who_holds_it_up()
            except RuntimeError as error:
                if self._closed.is_set() or still < self._limit:
                    continue
                found = f"rank 0 or the launcher, which keep the launch's store, do not answer ({str(error).splitlines()[0]})"
            if found and time.monotonic() - self._since >= still:
                self._end(still, found)

    def _everyone(self) -> list[list[Any]]:
        return [json.loads(self._store.get(f"watchdog/{rank}")) for rank in range(self._ranks.world_size)]

    def _who_holds_it_up(self) -> str:
        """Who does not answer, else who is behind; empty if it is somebody who may take long."""
        if self._store is None:
            return "it is the only rank"
        before = self._everyone()
        time.sleep(3 * self._interval)  # each living rank has beaten in between
        self._beat()
        now = self._everyone()
        names = [f"rank {rank} (process {pid} on {host})" for rank, (*_, host, pid) in enumerate(now)]
        silent = [names[rank] for rank, (old, new) in enumerate(zip(before, now)) if old[0] == new[0]]
        if silent:
            return f"{', '.join(silent)} does not answer: stopped, swapped out, or its host is gone"
        least = min(beat[1] for beat in now)
        behind = [rank for rank, beat in enumerate(now) if beat[1] == least]
        if any(now[rank][2] == SAVING for rank in behind):
            return ""
        if len(behind) == len(now):
            return "all ranks answer and stand at the same place: look at the network, then at NCCL_DEBUG=INFO"
        return "; ".join(f"{names[rank]} is behind: {now[rank][2]} for {now[rank][3]:.0f} s" for rank in behind)

    def _end(self, still: float, found: str) -> None:
        print(
            f"HANGING: rank {self._ranks.rank} has been {self._doing} for {still:.0f} s without progress; {found}. "
            "The newest checkpoint is whole; the same command continues from it. (train.hang_seconds sets this limit.)",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        faulthandler.dump_traceback(all_threads=True)
        os._exit(EXIT_CODE)
