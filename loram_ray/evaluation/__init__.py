"""Evaluation: perplexity and exact match."""
