"""The C++ CPU backend: importing it registers it."""

from q3mega.ops.cpu import attention, lm_head

__all__ = ["attention", "lm_head"]
