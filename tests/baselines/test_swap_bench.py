"""The bench of loads runs and its numbers make sense; how good they are is for a quiet machine to say."""

import os

import pytest

from baselines.swap import bench

pytestmark = pytest.mark.cpu


def test_the_bench_compares_loads_with_plain_copies_and_leaves_the_cores_as_they_were(tiny_checkpoints, capsys):
    cores = os.sched_getaffinity(0)
    assert bench.main(["--model", str(tiny_checkpoints["mixtral"]), "--rounds", "2", "--link-gbps", "0.5"]) == 0
    _, _, *rows = capsys.readouterr().out.strip().splitlines()
    assert len(rows) == (4 if len(cores) > 1 else 2)
    for row in rows:
        _, link, plain, load, *_ = row.split()
        assert float(plain) > 0 and float(load) > 0
        assert link == "none" or float(load) <= 0.51
    assert os.sched_getaffinity(0) == cores


def test_a_bandwidth_of_zero_is_one_line(capsys):
    assert bench.main(["--link-gbps", "0"]) == 2
    assert "--link-gbps more than 0" in capsys.readouterr().err
