"""The simulated backend: the same systems and policies on a virtual clock, with costs in place of computing."""
