"""Swap: weights of more models than fit, brought from host memory when their requests come."""
