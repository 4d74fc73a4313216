"""Many fine-tuning tasks over one model."""
