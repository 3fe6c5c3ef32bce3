"""Measures this machine: fused losses, training step, scoring."""
