"""Compiled code for a CPU, and the packed matrices that it multiplies with."""
