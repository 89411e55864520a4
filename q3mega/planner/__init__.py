"""Memory, time and communication of a layout, before any GPU is asked for."""
