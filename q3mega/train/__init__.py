"""The two loops: predict under a mask, and roll out - score - credit - update."""
