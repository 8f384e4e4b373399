"""Inference: how it is computed. Loops and solvers."""
