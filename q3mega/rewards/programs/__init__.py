"""The reward of programs: found in a reply, run on tests."""
