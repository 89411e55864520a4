"""The recipe: YAML in, one typed object out; every section and every stage's settings."""
