"""Evaluation: perplexity, multiple choice, generated answers, programs."""
