"""Worker processes: one a device, pinned to a core, one compute thread; the host talks to them through shared memory."""
