"""Verifiable tasks: three reasoning families, general capabilities, worked solutions, a teacher."""

from q3mega.data.tasks import general, reasoning
from q3mega.data.tasks.base import FAMILIES, Family, Problem, family, generate, problem

__all__ = ["FAMILIES", "Family", "Problem", "family", "general", "generate", "problem", "reasoning"]
