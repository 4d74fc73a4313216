"""The comparison: LoRAM in its variants against what else one could do."""
