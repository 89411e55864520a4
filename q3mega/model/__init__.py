"""Qwen3: shapes, megatron-core layer specs, and the map between its weights and Hugging Face's."""

from q3mega.model.sizes import QWEN3, Qwen3Shape

__all__ = ["QWEN3", "Qwen3Shape"]
