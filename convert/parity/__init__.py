"""Comparison of the two frameworks: the same weights, the same batch, float64 on both sides."""
