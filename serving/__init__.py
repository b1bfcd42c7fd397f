"""What every system is built from: model specs and layers, checkpoints, devices and their memory, mailboxes, workers."""
