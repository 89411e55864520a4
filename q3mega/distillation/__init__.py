"""Teachers: in process, in a job of their own, on a server; their top-k on disk."""
