"""Rollouts: samplers, the thinking budget, multi-turn episodes with tools."""

from q3mega.rollout.base import STOP_THINKING, Completion, Sampler, SamplingParams

__all__ = ["STOP_THINKING", "Completion", "Sampler", "SamplingParams"]
