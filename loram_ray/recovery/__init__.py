"""From an adapter of a pruned model to one of the base."""
