"""What a recipe will need, from shapes alone: parameters, bytes, memory of training, GPUs."""
