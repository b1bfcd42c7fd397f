"""Weights that come and go: models kept in host memory, copied layer by layer into a device's arena while others compute."""
