"""Programs of models, run in confined processes."""
