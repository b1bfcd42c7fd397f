"""`python -m serving.bench_crossing`: what one crossing of the pool boundary costs on this machine.

Two processes pinned to two cores exchange rows of `--hidden` float32 values through the mailbox that the engine uses: the
other side copies what came to where the result goes and publishes it. With `--transport gloo` they exchange them through
`torch.distributed` over loopback, as pools on different hosts do. Prints percentiles of the round trip as a table and, with
`--json`, as JSON. Half a round trip is one way.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from serving.errors import UserError, command
from serving.shm.mailbox import Mailbox, MailboxShape
from serving.shm.region import SharedRegion
from serving.transport.distributed import DistributedFFN, serve

_STOP_LAYER = -1
_WARM_UP_ROUNDS = 500


def echo(fd: int, size_bytes: int, slot_bytes: int, hidden: int, core: int) -> None:
    """The far side: copy every message back until one names the stop layer."""
    os.sched_setaffinity(0, {core})
    mailbox = Mailbox(SharedRegion(size_bytes, fd=fd), MailboxShape(1, slot_bytes))
    while True:
        work = mailbox.receive(0)
        if work is None:
            continue
        _, layer, rows = work
        inbound, outbound = mailbox.views(0, rows, hidden, torch.float32)
        outbound.copy_(inbound)
        mailbox.publish(0)
        if layer == _STOP_LAYER:
            return


def measure(rows: int, hidden: int, rounds: int, cores: tuple[int, int]) -> np.ndarray:
    """Round-trip times of `rounds` exchanges of [rows, hidden] float32, in microseconds. Checks what comes back."""
    shape = MailboxShape(1, rows * hidden * 4)
    region = SharedRegion(shape.region_bytes)
    arguments = [str(value) for value in (region.fd, region.size_bytes, shape.slot_bytes, hidden, cores[1])]
    far = subprocess.Popen([sys.executable, "-m", "serving.bench_crossing", "--echo", *arguments], pass_fds=[region.fd])
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cores[0]})
    try:
        mailbox = Mailbox(region, shape)
        message = torch.randn(rows, hidden)
        times_us = np.empty(rounds)
        for index in range(-_WARM_UP_ROUNDS, rounds):
            started_ns = time.perf_counter_ns()
            mailbox.send(0, 0, 0, message)
            while not mailbox.done(0):
                if index == -_WARM_UP_ROUNDS and far.poll() is not None:
                    raise UserError(f"the far side ended with status {far.returncode}")
            if index >= 0:
                times_us[index] = (time.perf_counter_ns() - started_ns) / 1e3
        if not torch.equal(mailbox.result(0, rows, hidden, torch.float32), message):
            raise UserError("the rows that came back are not the rows that were sent")
        mailbox.send(0, 0, _STOP_LAYER, message)
        far.wait(timeout=10)
    finally:
        os.sched_setaffinity(0, before)
        if far.poll() is None:
            far.kill()
        far.wait()
    return times_us


def echo_distributed(port: int, hidden: int, core: int) -> None:
    """The far side over `torch.distributed`: send all rows back until told to stop."""
    os.sched_setaffinity(0, {core})
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=1, world_size=2)
    serve(0, [(hidden, torch.float32)], lambda model, layer, rows: rows)
    dist.destroy_process_group()


def measure_distributed(rows: int, hidden: int, rounds: int, cores: tuple[int, int]) -> np.ndarray:
    """As :func:`measure`, over `torch.distributed` (gloo) on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = [str(value) for value in (port, hidden, cores[1])]
    far = subprocess.Popen([sys.executable, "-m", "serving.bench_crossing", "--echo-distributed", *arguments])
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cores[0]})
    try:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=2)
        near = DistributedFFN(peer=1, lanes=1)
        message = torch.randn(rows, hidden)
        times_us = np.empty(rounds)
        for index in range(-_WARM_UP_ROUNDS, rounds):
            started_ns = time.perf_counter_ns()
            near.send(0, 0, 0, message)
            near.rest()
            if index >= 0:
                times_us[index] = (time.perf_counter_ns() - started_ns) / 1e3
        if not torch.equal(near.result(0), message):
            raise UserError("the rows that came back are not the rows that were sent")
        near.close()
        far.wait(timeout=10)
        dist.destroy_process_group()
    finally:
        os.sched_setaffinity(0, before)
        if far.poll() is None:
            far.kill()
        far.wait()
    return times_us


_TRANSPORTS = {"shared-memory": measure, "gloo": measure_distributed}


@command
def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == ["--echo"]:
        echo(*(int(value) for value in arguments[1:]))
        return 0
    if arguments[:1] == ["--echo-distributed"]:
        echo_distributed(*(int(value) for value in arguments[1:]))
        return 0
    parser = argparse.ArgumentParser(prog="python -m serving.bench_crossing", description=__doc__.split("\n\n")[0])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--rounds", type=int, default=20_000)
    parser.add_argument("--transport", nargs="+", default=["shared-memory"], choices=_TRANSPORTS)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(arguments)
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise UserError(f"a crossing needs two cores; this process may use {len(cores)}")
    torch.set_num_threads(1)
    table = []
    for transport in args.transport:
        for rows in args.rows:
            times_us = _TRANSPORTS[transport](rows, args.hidden, args.rounds, (cores[0], cores[1]))
            p50, p90, p99 = np.percentile(times_us, [50, 90, 99])
            shape = {"transport": transport, "rows": rows, "hidden": args.hidden}
            table.append({**shape, "p50_us": p50, "p90_us": p90, "p99_us": p99})
    if args.json:
        print(json.dumps({"round_trip": table, "rounds": args.rounds}))
        return 0
    print(f"round trip of [rows, {args.hidden}] float32, {args.rounds} rounds")
    print(f"{'transport':>14} {'rows':>5} {'p50 us':>8} {'p90 us':>8} {'p99 us':>8} {'one way p50 us':>15}")
    for row in table:
        print(
            f"{row['transport']:>14} {row['rows']:>5} {row['p50_us']:>8.2f} {row['p90_us']:>8.2f} {row['p99_us']:>8.2f} "
            f"{row['p50_us'] / 2:>15.2f}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
