"""Reports on runs, batches, sweeps and comparisons."""
