"""The reward of mathematical answers: notation, equality, algebra."""
