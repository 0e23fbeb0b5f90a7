"""A run that stands still names the rank that holds it up, and ends; ranks whose launcher is gone don't outlive it.

Collectives wait for each other for half an hour, in silence, and the main thread can't look around meanwhile. So each rank
has a thread that says, every few seconds, in the launch's own key-value store, how far its rank has come.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from typing import Any

import torch.distributed as dist

from mapet_ds.launch import Ranks
from mapet_ds.launchers import has_ended, launchers

SAVING = "saving a checkpoint"
PROBING = "judging features for all ranks"
GOING_BACK = "going back to a checkpoint"
FOR_ALL = (SAVING, PROBING)
"""What rank 0 does while the others wait, who are not hanging either."""
UNTIMED = (*FOR_ALL, GOING_BACK)
"""May take as long as a disk takes, or a CPU."""
ORPHAN_SECONDS = 25
"""Without progress, after the launcher's death; ranks that still make progress stop by themselves (launch.StopRequest)."""
ANSWER_SECONDS = 60
EXIT_CODE = 3


class Watchdog:
    """Watches over this rank's training from now until `close`. Every rank must build one, and report as many activities.

    limit: seconds without progress after which the run is taken for hung. It ends the process with EXIT_CODE, what it knows
    and where the threads stand on standard error; the launcher then ends the other ranks.
    """

    def __init__(self, limit: float, ranks: Ranks) -> None:
        self._limit, self._ranks, self._launchers = limit, ranks, launchers()
        self._interval, self._beats = min(5.0, limit / 4), 0
        self._state = 0, "starting", time.monotonic()  # activities so far, the present one, its beginning
        self._store = None
        if ranks.world_size > 1:  # a connection of its own: the main thread's may be waiting for an answer
            address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            self._store = dist.TCPStore(*address, is_master=False, wait_for_workers=False)
            self._beat()
            dist.barrier(ranks.control)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def doing(self, activity: str) -> None:
        """Note that the last activity is over and this one begins. No host wait."""
        self._state = self._state[0] + 1, activity, time.monotonic()

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        self._thread.join()

    def _beat(self) -> None:
        if self._store is None:
            return
        self._beats += 1
        progress, doing, since = self._state
        beat = [self._beats, progress, doing, time.monotonic() - since, socket.gethostname(), os.getpid()]
        with contextlib.suppress(RuntimeError):  # a store that is gone shows when it is asked
            self._store.set(f"watchdog/{self._ranks.rank}", json.dumps(beat))

    def _watch(self) -> None:
        while not self._closed.wait(self._interval):
            self._beat()
            progress, doing, since = self._state
            still = time.monotonic() - since
            orphaned = any(map(has_ended, self._launchers))
            if doing in UNTIMED or still < (min(self._limit, ORPHAN_SECONDS) if orphaned else self._limit):
                continue
            found = "its launcher is gone" if orphaned else self._ask()
            if found and self._state[0] == progress:
                self._end(doing, still, found)

    def _ask(self) -> str:
        """`_who_holds_it_up`, in a thread of its own: a frozen store may never answer, whatever its timeout says."""
        answers: list[str] = []

        def ask() -> None:
            with contextlib.suppress(RuntimeError):
                answers.append(self._who_holds_it_up())

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(ANSWER_SECONDS if self._limit > ANSWER_SECONDS else 5 * self._interval)
        return (
            answers[0]
            if answers
            else "rank 0 or the launcher, one of which keeps the launch's store, does not answer"
        )

    def _everyone(self) -> list[list[Any]]:
        keys = [f"watchdog/{rank}" for rank in range(self._ranks.world_size)]
        return [json.loads(beat) for beat in self._store.multi_get(keys)]

    def _who_holds_it_up(self) -> str:
        """Who does not answer, else who is behind; empty where rank 0 does what may take long."""
        if self._store is None:
            return "it is the only rank"
        before = self._everyone()
        time.sleep(3 * self._interval)  # each living rank has beaten in between
        self._beat()
        now = self._everyone()
        names = [f"rank {rank} (process {pid} on {host})" for rank, (*_, host, pid) in enumerate(now)]
        silent = [
            names[rank]
            for rank, (old, new) in enumerate(zip(before, now))
            if old[0] == new[0] and rank != self._ranks.rank
        ]
        if silent:
            return f"{', '.join(silent)} does not answer: stopped, swapped out, or its host is gone"
        least = min(beat[1] for beat in now)
        behind = [rank for rank, beat in enumerate(now) if beat[1] == least]
        if any(now[rank][2] in FOR_ALL for rank in behind):
            return ""
        if len(behind) == len(now):
            return (
                "all ranks answer and are as far: one has not come to a collective, or the network is down. Compare the stacks "
                "below: the rank that is in no collective holds the others up"
            )
        return "; ".join(
            f"{names[rank]} is behind: {now[rank][2]} for {now[rank][3]:.0f} s" for rank in behind
        )

    def _end(self, doing: str, still: float, found: str) -> None:
        try:
            print(
                f"HANGING: rank {self._ranks.rank} has been {doing} for {still:.0f} s without progress; {found}. "
                "The newest checkpoint is whole; the same command continues from it. (train.hang_seconds sets this limit.)",
                file=sys.stderr, flush=True,
            )  # fmt: skip
            faulthandler.dump_traceback(all_threads=True)
        finally:  # also where nobody is left to read it
            os._exit(EXIT_CODE)
