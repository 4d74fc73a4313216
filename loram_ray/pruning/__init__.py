"""Pruning criteria and the plans they make."""
