"""Fine-tuning: LoRA on a frozen pruned, aligned or base model."""
