"""Align a pruned model by continual pre-training on Ray Train and DeepSpeed."""
