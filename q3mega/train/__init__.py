"""The two loops: predict under a mask; roll out, score, compute advantages, update."""
