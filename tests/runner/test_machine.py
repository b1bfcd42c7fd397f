"""A record names the hardware that computed, runs do not share cores, and what others took of them is seen."""

import fcntl
import os
import subprocess
import sys
import time

import pytest

from runner import locks, machine
from runner.config import DeviceEntry
from runner.machine import Card, CpuUse, cards_of, cores_of
from serving.errors import UserError

pytestmark = pytest.mark.cpu

BURN = "import time\nend = time.monotonic() + 60\nwhile time.monotonic() < end: pass"


def test_devices_are_cores_in_the_order_that_they_are_named():
    usable = sorted(os.sched_getaffinity(0))
    assert cores_of([DeviceEntry("cpu:0", 1, index=0)]) == (usable[0],)


@pytest.mark.parametrize(
    ("devices", "words"),
    [
        ([DeviceEntry("npu", 1, kind="npu")], "npu: unknown kind 'npu'; known: cpu, cuda"),
        ([DeviceEntry("far", 1, index=4096)], "far: index is 4096, this process may use"),
        ([DeviceEntry("neg", 1, index=-1)], "neg: index is -1"),
        ([DeviceEntry("a", 1, index=0), DeviceEntry("b", 1, index=0)], "b: has the core of a"),
    ],
)
def test_a_device_that_is_not_there_is_refused(devices, words):
    with pytest.raises(UserError, match=words):
        cores_of(devices)


def test_devices_share_cores_only_when_asked():
    usable = sorted(os.sched_getaffinity(0))
    devices = [DeviceEntry(f"cpu:{i}", 1, index=i) for i in range(len(usable) + 1)]
    with pytest.raises(UserError, match="backend.oversubscribe=true lets devices share cores"):
        cores_of(devices)
    assert cores_of(devices, oversubscribe=True) == (*usable, usable[0])


@pytest.fixture
def two_cards(monkeypatch):
    cards = (Card(0, "a card", 1000, "a"), Card(1, "a card", 1000, "b"))
    monkeypatch.setattr(machine, "cards_here", lambda: cards)
    return cards


def card_device(name, index, memory_mib=400):
    return DeviceEntry(name, memory_mib, kind="cuda", index=index)


def test_devices_share_a_card_within_its_memory(two_cards):
    devices = [card_device("a", 1), DeviceEntry("cpu:0", 1, index=0), card_device("b", 0), card_device("c", 1)]
    assert cards_of(devices) == (two_cards[1], two_cards[0], two_cards[1])
    assert len(cores_of(devices)) == 1
    with pytest.raises(UserError, match="d: budgets of 1200 MiB on card 1, which has 1000 MiB"):
        cards_of([*devices, card_device("d", 1)])


def test_a_card_that_is_not_there_is_refused(two_cards):
    with pytest.raises(UserError, match="far: is card 2, and torch sees a card, a card"):
        cards_of([card_device("far", 2)])


@pytest.mark.alone
def test_what_a_child_computes_is_our_own_and_not_others():
    cores = sorted(os.sched_getaffinity(0))  # all of them: what is our own may run on any
    before = CpuUse.now(cores)
    with subprocess.Popen([sys.executable, "-c", BURN]) as child:
        time.sleep(0.5)
        after = CpuUse.now(cores)
        child.kill()
    assert after.own_s - before.own_s > 0.05
    assert after.all_s - before.all_s >= after.own_s - before.own_s - 0.1
    assert 0 <= after.others_share_since(before) <= 1


@pytest.mark.parametrize(
    ("all_s", "own_s", "share"), [(3.0, 1.0, 0.5), (1.0, 1.0, 0.0), (9.0, 0.0, 1.0), (0.5, 1.0, 0.0)]
)
def test_the_share_of_others_is_what_is_left(all_s, own_s, share):
    before, after = CpuUse(10.0, 5.0, 100.0, cores=2), CpuUse(10.0 + all_s, 5.0 + own_s, 102.0, cores=2)
    assert after.others_share_since(before) == pytest.approx(share)
    assert before.others_share_since(before) is None


@pytest.mark.alone
def test_a_lock_makes_the_second_wait_and_ends_with_its_process(tmp_path, capfd):
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom runner import locks\n"
        "with locks.exclusive(Path(sys.argv[1]), 'it'):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": "."}) as holder:
        assert holder.stdout.readline() == "held\n"
        killer = subprocess.Popen(["sh", "-c", f"sleep 0.4; kill -9 {holder.pid}"])
        started = time.monotonic()
        with locks.exclusive(tmp_path / "lock", "the thing"):
            waited_s = time.monotonic() - started
        killer.wait()
    assert waited_s > 0.2
    assert "waiting for the thing, which another run is using" in capfd.readouterr().err


def test_runs_on_different_cards_do_not_wait_and_on_the_same_one_do(tmp_path, monkeypatch):
    """Cards are locked by UUID: number 0 of two processes are two cards where CUDA_VISIBLE_DEVICES says so."""
    monkeypatch.setattr(locks.tempfile, "gettempdir", lambda: str(tmp_path))
    with locks.computing((), ["a"]), locks.computing((), ["b"]):
        (folder,) = tmp_path.iterdir()
        assert {path.name for path in folder.iterdir()} == {"card-a.lock", "card-b.lock"}
        with (folder / "card-a.lock").open() as held, pytest.raises(BlockingIOError):
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
