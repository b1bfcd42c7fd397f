"""Traces of requests: which model is asked, when, with what prompt, for how many tokens. Knows nobody; no torch."""
