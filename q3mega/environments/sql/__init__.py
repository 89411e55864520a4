"""An invented database: a tool that queries it, and questions that take a query."""
