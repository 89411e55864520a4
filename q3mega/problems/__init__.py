"""Verifiable tasks: three reasoning families, general capabilities, worked solutions, a teacher."""

from q3mega.problems.base import FAMILIES, Family, Problem, family, generate, problem
from q3mega.problems.generated import general, reasoning

__all__ = ["FAMILIES", "Family", "Problem", "family", "general", "generate", "problem", "reasoning"]
