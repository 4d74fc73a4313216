"""Estimate memory, time and sizes analytically, before anything runs."""
