"""Evaluation sets for models of real size, generated from a seed."""
