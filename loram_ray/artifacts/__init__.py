"""What stages leave on disk: tensors, manifests, adapters, whole output directories."""

FORMAT = 1
"""Version of the format in which stages write their directories."""
