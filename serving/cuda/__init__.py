"""The CUDA half of the real backend: memory by driver calls, halves on a card, steps as graphs. Imported for `cuda` devices
only, so that CPU runs load neither Triton nor a driver."""
