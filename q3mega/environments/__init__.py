"""Environments of several turns: each has its tools and the problems that need them."""
