"""Replays a trace against a system, measures what happened and keeps a record of it. Knows systems by one interface."""
