"""The kernels' bench: `python -m kernels.bench [op ...]`. Nothing is timed that is not first found correct."""
