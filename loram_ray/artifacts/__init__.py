"""Files that stages write: tensors, manifests, adapters and output directories."""

FORMAT = 1
"""Version of the format of stage directories."""
