"""Variants of SAM: each file is one, with its equation and its paper."""
