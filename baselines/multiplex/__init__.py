"""Multiplexing: models share devices, all weights resident, and what is left of each device is KV of whoever needs it."""
