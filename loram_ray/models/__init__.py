"""Base and pruned models: loading, modelling code, tokenizers, NF4 and GGUF."""
