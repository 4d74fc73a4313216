"""Recovery: from an adapter of a pruned model to an adapter of the base."""
