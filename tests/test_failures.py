"""When things go wrong: a clear error that names what, nothing lost, nothing left behind."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import judges
import psutil
import pytest

from serving import registry
from serving.errors import CapacityError, UserError, WorkerDied
from serving.generate import cpu_cluster, main
from serving.interface import Demand, EventKind, Request, ServedModel
from serving.spec import load_spec

pytestmark = pytest.mark.cpu

REPOSITORY = Path(__file__).resolve().parents[1]
MEMORY_BYTES = 64 << 20


def started(name, checkpoint, **options):
    model = ServedModel(load_spec(checkpoint, "model"), checkpoint)
    system = registry.create(name, {"page_bytes": 4096, **options})
    system.start(system.plan(cpu_cluster(2, MEMORY_BYTES), [model], Demand()))
    return system, model


@pytest.mark.parametrize("control", ["lowered", "host"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_worker_is_named_within_seconds_and_nothing_is_left(victim, control, tiny_checkpoints):
    system, model = started("crosspool", tiny_checkpoints["mixtral"], control=control)
    rng = random.Random(victim)
    try:
        for number in range(6):
            system.submit(Request(number, "model", tuple(rng.randrange(300) for _ in range(20)), 400))
        time.sleep(rng.uniform(0.05, 0.3))
        child = judges.worker_processes()[victim]
        os.kill(child.pid, signal.SIGKILL)
        deadline = time.monotonic() + 5
        with pytest.raises(WorkerDied, match=r"worker crosspool/(cpu:\d|relay) was killed by signal 9"):
            while time.monotonic() < deadline:
                system.poll()
                time.sleep(0.002)
    finally:
        system.stop()
    assert not judges.worker_processes()
    assert model.name == "model"


def test_workers_die_with_their_host(tiny_checkpoints):
    """A host that is killed cannot clean up; the kernel ends its workers."""
    program = (
        "import sys, time\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "from pathlib import Path\n"
        "from test_failures import started\n"
        "system, _ = started('static', Path(sys.argv[1]))\n"
        "print(' '.join(str(w.pid) for w, _ in system._workers), flush=True)\n"
        "time.sleep(60)\n"
    )
    host = subprocess.Popen(
        [sys.executable, "-c", program, str(tiny_checkpoints["mixtral"]), str(Path(__file__).parent)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    pids = [int(pid) for pid in host.stdout.readline().split()]
    assert pids
    host.kill()
    host.wait()
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=5)
    assert not alive


@pytest.mark.parametrize("system", ["crosspool", "static"])
def test_a_model_that_does_not_fit_names_the_device_and_the_missing_bytes(system, tiny_checkpoints):
    model = ServedModel(load_spec(tiny_checkpoints["mixtral"]), tiny_checkpoints["mixtral"])
    with pytest.raises(CapacityError, match=r"cpu:\d: .* need .* of 200\.0 KiB; \d+ bytes .* are missing"):
        registry.create(system).plan(cpu_cluster(2, 200 << 10), [model], Demand())


def test_a_device_without_room_for_any_kv_is_refused(tiny_checkpoints):
    model = ServedModel(load_spec(tiny_checkpoints["mixtral"]), tiny_checkpoints["mixtral"])
    with pytest.raises(CapacityError, match="one token of .* needs"):
        registry.create("crosspool", {"page_bytes": 1 << 20}).plan(cpu_cluster(2, 3 << 20), [model], Demand())


def test_requests_that_can_never_be_served_are_rejected_with_the_reason(tiny_checkpoints):
    system, model = started("crosspool", tiny_checkpoints["mixtral"])
    context = model.spec.max_context_tokens
    bad = {
        0: Request(0, "model", (1,) * context, 1),
        1: Request(1, "no-such-model", (1,), 1),
        2: Request(2, "model", (), 1),
        3: Request(3, "model", (model.spec.vocab_size,), 1),
    }
    try:
        for request in bad.values():
            system.submit(request)
        events = {event.request_id: event for event in system.poll()}
    finally:
        system.stop()
    assert all(events[number].kind is EventKind.REJECTED for number in bad)
    for number, words in enumerate(("exceed the context", "unknown model", "at least one prompt token", "must lie in")):
        assert words in events[number].reason


def test_a_request_that_waits_past_the_deadline_is_rejected(tiny_checkpoints):
    system, _ = started("crosspool", tiny_checkpoints["mixtral"], max_running=1, queue_deadline_s=0.05)
    outcomes = {}
    try:
        system.submit(Request(0, "model", (1, 2, 3), 400))
        system.submit(Request(1, "model", (1, 2, 3), 4))
        while len(outcomes) < 2:
            for event in system.poll():
                if event.kind.terminal:
                    outcomes[event.request_id] = event
            time.sleep(0.001)
    finally:
        system.stop()
    assert outcomes[0].kind is EventKind.COMPLETED
    assert outcomes[1].kind is EventKind.REJECTED and "waited longer than 0.05 s" in outcomes[1].reason


GENERATE_ERRORS = {
    "unknown system": (["--system", "magic"], "unknown system 'magic'; known: crosspool, "),
    "unknown option": (["--option", "speed=9"], "system 'crosspool' has no option 'speed'"),
    "bad option value": (["--option", "lanes=0"], "option lanes is 0"),
    "ids that are none": (["--prompt-ids", "1,x"], "is not a comma-separated list of integers"),
    "ids out of range": (["--prompt-ids", "999999"], "prompt ids must lie in"),
    "too long": (["--max-new-tokens", "100000"], "exceed the context"),
    "too little memory": (["--device-memory-mib", "0"], "bytes are missing"),
    "one device": (
        ["--devices", "1"],
        "crosspool needs 2 devices at least, 1 for KV and one for the weights pool; there are 1",
    ),
}


@pytest.mark.parametrize("case", GENERATE_ERRORS)
def test_generate_says_what_is_wrong_in_one_line(case, tiny_checkpoints, capsys):
    arguments, words = GENERATE_ERRORS[case]
    base = ["--model", str(tiny_checkpoints["mixtral"]), "--device-memory-mib", "64"]
    ids = [] if "--prompt-ids" in arguments else ["--prompt-ids", "1,2"]
    assert main([*base, *ids, *arguments]) == 2
    captured = capsys.readouterr()
    assert words in captured.err or "missing" in captured.err
    assert len(captured.err.strip().splitlines()) == 1 and not captured.out
    assert not judges.worker_processes()


def test_starting_twice_is_refused(tiny_checkpoints):
    system, model = started("static", tiny_checkpoints["mixtral"])
    try:
        with pytest.raises(UserError, match="running already"):
            system.start(system.plan(cpu_cluster(2, MEMORY_BYTES), [model], Demand()))
    finally:
        system.stop()
        system.stop()
