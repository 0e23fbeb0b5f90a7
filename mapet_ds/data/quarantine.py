"""The unreadable images of a run, as a file in its folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mapet_ds.config.sections import RunConfig
from mapet_ds.data.index import Index
from mapet_ds.data.samples import allowed_bad, too_many_bad
from mapet_ds.files import write_whole
from mapet_ds.launch import Ranks


class Quarantine:
    """RUN/quarantine.tsv: the unreadable images that any rank has met: place in the index, path, reason.

    Its first line is the index's fingerprint: a list of another data set is not believed.
    """

    def __init__(self, config: RunConfig, index: Index) -> None:
        self.config, self.index = config, index
        self.path = path = Path(config.run_dir) / "quarantine.tsv"
        head, *lines = path.read_text(errors="replace").split("\n")[:-1] or [""] if path.exists() else [""]
        self.lines = lines if head == self._head else []
        self.known = {int(line.split("\t")[0]) for line in self.lines}
        self.written = len(self.lines)

    @property
    def _head(self) -> str:
        return f"# unreadable images of the data set {self.index.fingerprint}"

    def merge(self, found: list[tuple[int, str]], ranks: Ranks) -> None:
        """Add what the ranks have met since the last call. Every rank must call it.

        Raises:
            DataError: more than data.max_bad_share of the data set is unreadable.
        """
        everyone = ranks.gather(found)
        new = {i: reason for rank in everyone for i, reason in rank if i not in self.known}
        if not new and self.written == len(self.lines):
            return
        self.known |= new.keys()
        # json.dumps, without its quotes, keeps any name on one line
        self.lines += [
            f"{i}\t{json.dumps(self.index.path(i))[1:-1]}\t{reason}" for i, reason in sorted(new.items())
        ]
        self.written = len(self.lines)
        if ranks.rank == 0:
            try:
                write_whole(self.path, "\n".join([self._head, *self.lines, ""]))
            except OSError as error:
                self.written = 0
                print(f"NOT WRITTEN yet, {self.path}: {error}.", file=sys.stderr, flush=True)
            print(
                f"Unreadable and replaced: {len(new)} more, {len(self.known)} in all, listed in {self.path}.",
                flush=True,
            )
        if len(self.known) > allowed_bad(self.config, self.index):
            raise too_many_bad(self.config, self.index, sorted(self.known))
