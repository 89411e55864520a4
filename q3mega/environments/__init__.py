"""Environments of several turns: tools that run, and the problems that need them."""
