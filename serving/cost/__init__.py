"""What an operator costs: hardware, model facts, and fitted cost forms, for the planner and for the simulated backend."""
