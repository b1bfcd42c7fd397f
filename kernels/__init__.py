"""Operators, one folder each: `reference.py` in plain torch, `triton.py` for CUDA, and an entry point that picks by device.

Importing this package imports nothing heavy: `transformers` looks for a Hugging Face package of the same name, finds this
one first, reads `__version__`, and must conclude (as it does for any version outside its range) that hers is absent.
"""

__version__ = "0.1.0"
