"""Weights in 8 and 4 bits: which matrices take them, and a finished decoder rewritten to them."""
