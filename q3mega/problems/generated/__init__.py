"""Generators of the laptop's problems, their solutions and a scripted teacher."""
