"""Rewards of instructions that a rule can check."""
