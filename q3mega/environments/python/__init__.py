"""Programs: a tool that runs them, and computations that need one."""
