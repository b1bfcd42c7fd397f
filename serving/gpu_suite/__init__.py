"""Everything that only a card can answer, in one command: `python -m serving.gpu_suite --out DIR`."""
