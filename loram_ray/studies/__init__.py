"""Run many stages as one job: batches of tasks, sweeps and comparisons."""
