"""Trials of a training's settings, of which the best is kept."""
