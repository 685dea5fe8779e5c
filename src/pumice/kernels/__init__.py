"""Compiled code for CPUs, and the packed (quantised) matrices that it multiplies with."""
