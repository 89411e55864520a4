"""Rewards that a model gives: a judge with a reference, a preference model."""
