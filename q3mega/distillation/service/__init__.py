"""A teacher in a job of its own: hidden states between two jobs' ranks."""
