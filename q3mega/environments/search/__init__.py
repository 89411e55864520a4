"""An invented archive: a tool that searches it, and questions that it answers or does not."""
