"""New weights for rollout servers: through a folder, or by broadcast."""
