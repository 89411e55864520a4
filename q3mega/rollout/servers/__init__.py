"""Sampling on vLLM and SGLang servers."""
