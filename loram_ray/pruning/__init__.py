"""Pruning criteria and the pruning plans they produce."""
