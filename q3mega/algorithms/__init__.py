"""Losses, advantages, rollout correction, entropy control."""
