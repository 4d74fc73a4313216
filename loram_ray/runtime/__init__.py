"""Services of a running command: Ray clusters, actors, jobs, signals, progress and locks."""
