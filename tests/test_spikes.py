"""Which steps a jump of the loss passes over, however the run got there."""

import json
import math

import pytest

from mapet_ds.config.sections import Config, LogConfig
from mapet_ds.training.spikes import FEWEST, SpikeGuard

LINES = [
    *({"step": step, "loss": 2.0} for step in range(10, 10 * FEWEST + 20, 10)),
    {"step": 65, "loss": 2.1}, {"step": 70, "loss": 2.2},  # a pause
    {"step": 80}, {"step": 90},  # passed over
    {"step": 100, "loss": math.nan}, {"step": 110, "loss": 2.3},
]  # fmt: skip
FIRST = {60: 50, 65: 60, 70: 65, 80: 65, 90: 65, 100: 90, 110: 100}
"""By the step before a jump: where what is passed over begins."""


def guard(folder, ranks):
    config = Config(run_dir=str(folder), log=LogConfig(every_steps=10))
    (folder / "rollbacks.json").unlink(missing_ok=True)
    return SpikeGuard(config, folder, ranks)


@pytest.mark.parametrize("step", FIRST)
def test_a_run_that_was_started_again_judges_as_one_that_was_not(alone, tmp_path, step):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    found, jump = [], {"step": step + 10, "loss": 9.0}
    straight = guard(tmp_path, alone)
    ends = [0, *(line["step"] for line in LINES)]
    for first, line in zip(ends, LINES):
        if line["step"] <= step:
            assert straight.judge(first, line) is None
    found.append(straight.judge(step, jump))
    resumed = guard(tmp_path, alone)
    resumed.recall(step)
    found.append(resumed.judge(step, jump))
    assert found[0] == found[1]
    assert found[0][:3] == (FIRST[step], step + 10, 9.0)
    assert resumed.passed_over == set(range(FIRST[step], step + 10))
    assert SpikeGuard(Config(run_dir=str(tmp_path)), tmp_path, alone).passed_over == resumed.passed_over


def test_a_line_that_was_lost_was_a_windows(alone, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES[:6]))
    resumed = guard(tmp_path, alone)
    resumed.recall(70)
    assert resumed.judge(70, {"step": 80, "loss": 9.0})[:2] == (60, 80)
