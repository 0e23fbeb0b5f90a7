"""The watchdog: it ends a run that stands still, names the rank at fault, and ends ranks without a launcher.

Collectives wait for each other for half an hour, in silence, and the main thread can't look around meanwhile.
So each rank has a thread that writes every few seconds, into the launch's own key-value store, how far its
rank is.
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
"""The activities of rank 0 during which the others wait and don't hang."""
UNTIMED = (*FOR_ALL, GOING_BACK)
"""The activities that may take as long as a disk or a CPU takes."""
ORPHAN_SECONDS = 25
"""The limit once the launcher is dead. Ranks that make progress stop by themselves (launch.StopRequest)."""
ANSWER_SECONDS = 60
"""The store, where it answers at all, answers within this time."""
EXIT_CODE = 3


class Watchdog:
    """A watch over this rank's training until `close`. Every rank must build one and note as many activities.

    limit: seconds without progress after which the run counts as hung. The watchdog then writes the cause and
    the threads' stacks to standard error and ends the process with EXIT_CODE; the launcher ends the other
    ranks.
    """

    def __init__(self, limit: float, ranks: Ranks) -> None:
        self._limit, self._ranks, self._launchers = limit, ranks, launchers()
        self._interval, self._beats = min(5.0, limit / 4), 0
        self._state = 0, "starting", time.monotonic()  # activities so far, the present one, its beginning
        self._store: dist.TCPStore | None = None
        if ranks.world_size > 1:
            # It has a connection of its own, because the main thread's may be waiting for an answer.
            address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            self._store = dist.TCPStore(*address, is_master=False, wait_for_workers=False)
            self._beat()
            dist.barrier(ranks.control)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def doing(self, activity: str) -> None:
        """Notes that the last activity is over and this one begins. The host waits for nothing."""
        self._state = self._state[0] + 1, activity, time.monotonic()

    def close(self) -> None:
        """Stops watching."""
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
            cause = "its launcher is gone" if orphaned else self._ask()
            if cause and self._state[0] == progress:
                self._end(doing, still, cause)

    def _ask(self) -> str:
        """The cause by the ranks' own beats, asked in a thread: a frozen store may ignore its timeout."""
        answers: list[str] = []

        def ask() -> None:
            with contextlib.suppress(RuntimeError):
                answers.append(self._who_holds_it_up())

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(ANSWER_SECONDS if self._limit > ANSWER_SECONDS else 5 * self._interval)
        if not answers:
            return "rank 0 or the launcher, one of which keeps the launch's store, does not answer"
        return answers[0]

    def _beats_of_all(self, store: dist.TCPStore) -> list[list[Any]]:
        keys = [f"watchdog/{rank}" for rank in range(self._ranks.world_size)]
        return [json.loads(beat) for beat in store.multi_get(keys)]

    def _who_holds_it_up(self) -> str:
        """The ranks that don't answer, else those that are behind; empty while rank 0 may take its time."""
        if self._store is None:
            return "it is the only rank"

        # Ranks that don't answer: each living rank beats between the two looks.
        before = self._beats_of_all(self._store)
        time.sleep(3 * self._interval)
        self._beat()
        now = self._beats_of_all(self._store)
        names = [f"rank {rank} (process {pid} on {host})" for rank, (*_, host, pid) in enumerate(now)]
        others = [rank for rank in range(len(now)) if rank != self._ranks.rank]
        if silent := [names[rank] for rank in others if before[rank][0] == now[rank][0]]:
            return f"{', '.join(silent)} does not answer: stopped, swapped out, or its host is gone"

        # Ranks that are behind.
        least = min(beat[1] for beat in now)
        behind = [rank for rank, beat in enumerate(now) if beat[1] == least]
        if any(now[rank][2] in FOR_ALL for rank in behind):
            return ""
        if len(behind) == len(now):
            return (
                "all ranks answer and are as far: one has not come to a collective, or the network is down. "
                "Compare the stacks below: the rank that is in no collective holds the others up"
            )
        return "; ".join(f"{names[i]} is behind: {now[i][2]} for {now[i][3]:.0f} s" for i in behind)

    def _end(self, doing: str, still: float, cause: str) -> None:
        message = (
            f"HANGING: rank {self._ranks.rank} has been {doing} for {still:.0f} s without progress; {cause}. "
            "The newest checkpoint is whole; the same command continues from it. (train.hang_seconds sets "
            "this limit.)"
        )
        try:
            print(message, file=sys.stderr, flush=True)
            faulthandler.dump_traceback(all_threads=True)
        finally:  # also where nobody is left to read it
            os._exit(EXIT_CODE)
