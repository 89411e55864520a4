"""Triton kernels, one file an operator; installed as q3mega.kernels."""
