"""The file in a run's folder that lists the unreadable images."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mapet_ds.config.running import RunConfig
from mapet_ds.data.index import Index
from mapet_ds.data.samples import check_bad
from mapet_ds.files import write_whole
from mapet_ds.launch import Ranks


class Quarantine:
    """RUN/quarantine.tsv: place in the index, path and reason of each unreadable image that a rank has met.

    Its first line is the index's fingerprint. The list of another data set is not read.
    """

    def __init__(self, config: RunConfig, index: Index) -> None:
        self.config, self.index = config, index
        self.path = Path(config.run_dir) / "quarantine.tsv"
        text = self.path.read_text(errors="replace") if self.path.exists() else ""
        head, *lines = text.split("\n")[:-1] or [""]
        self.lines = lines if head == self._head else []
        self.known = {int(line.split("\t")[0]) for line in self.lines}
        self.written = len(self.lines)

    @property
    def _head(self) -> str:
        return f"# unreadable images of the data set {self.index.fingerprint}"

    def merge(self, bad: list[tuple[int, str]], ranks: Ranks) -> None:
        """Adds the images that the ranks have met since the last call. Every rank must call it.

        bad: place in the index and reason of each image that this rank has met.

        Raises:
            DataError: more than data.max_bad_share of the data set is unreadable.
        """
        new = {i: reason for rank in ranks.gather(bad) for i, reason in rank if i not in self.known}
        if not new and self.written == len(self.lines):
            return
        self.known |= new.keys()
        for i, reason in sorted(new.items()):
            path = json.dumps(self.index.path(i))[1:-1]  # any name on one line
            self.lines.append(f"{i}\t{path}\t{reason}")
        self.written = len(self.lines)
        if ranks.rank == 0:
            try:
                write_whole(self.path, "\n".join([self._head, *self.lines, ""]))
            except OSError as error:
                self.written = 0
                print(f"NOT WRITTEN yet, {self.path}: {error}.", file=sys.stderr, flush=True)
            counts = f"{len(new)} more, {len(self.known)} in all"
            print(f"Unreadable and replaced: {counts}, listed in {self.path}.", flush=True)
        check_bad(self.config, self.index, sorted(self.known))
