"""A worker process: `python -m serving.workers`, started by its host, never by hand."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import pickle
import signal
import sys
import traceback

from serving.errors import UserError, one_line
from serving.workers.config import WorkerConfig

_PR_SET_PDEATHSIG = 1


def _die_with(parent_pid: int) -> None:
    """Have the kernel end this process when its host ends, however that happens."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        sys.exit(1)


def main() -> int:
    parent_pid = int(sys.argv[1])
    _die_with(parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the host decides what an interrupt means
    config: WorkerConfig = pickle.load(sys.stdin.buffer)
    if config.core is not None:
        os.sched_setaffinity(0, {config.core})

    def tell(**message: str) -> None:
        os.write(config.status_fd, json.dumps(message).encode() + b"\n")

    try:
        gc.disable()  # nothing of what is imported is garbage, and to look for some is a sixth of the time
        import torch

        torch.set_num_threads(1)
        from serving.memory.heap import keep_freed_memory
        from serving.workers.build import build_worker
        from serving.workers.timeline import Recorder

        gc.enable()
        recorder = Recorder(config.timeline) if config.timeline else None
        worker = build_worker(config, recorder)
        keep_freed_memory()
        tell(state="ready")
        worker.run()
        if recorder is not None:
            recorder.save()
    except UserError as error:
        tell(state="error", message=one_line(error))
        return 2
    except Exception as error:  # noqa: BLE001  whatever it is, the host must hear of it
        tell(state="error", message=one_line(f"{type(error).__name__}: {error}"))
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    # Skip interpreter shutdown: tensors over mapped ranges must not be freed in arbitrary order.
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
