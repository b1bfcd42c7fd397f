"""Figures, tables and claims, drawn from records and from the paper's numbers in paper.yaml, and from nothing else."""
