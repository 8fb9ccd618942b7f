"""Masks, layer distributions, scores, schedules and the sparsifiers made of them."""
