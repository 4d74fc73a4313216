"""Alignment: continual pre-training of a pruned model on Ray Train and DeepSpeed."""
