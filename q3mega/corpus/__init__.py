"""The laptop's pre-training text: documents of installed packages and of generators."""
