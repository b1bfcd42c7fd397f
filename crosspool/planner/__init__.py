"""CrossPool's offline planner and its online watch: how much KV memory, under which parallelism, laid out where.

`python -m crosspool.planner CONFIG` prints and draws a plan; :func:`crosspool.planner.demand.kv_budget_pages` and
:func:`crosspool.planner.layout.plan_pools` are what the engine calls. Pure numpy: no torch, no device, no clock.
"""
