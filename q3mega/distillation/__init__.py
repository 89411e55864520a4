"""Teachers of a distillation: in process, in a job of their own, behind a server; top-k on disk."""
