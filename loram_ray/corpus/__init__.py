"""Prepare text for alignment (read, tokenise, pack, stream) and examples for fine-tuning."""
