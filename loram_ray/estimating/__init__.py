"""Memory, time and sizes by arithmetic, before anything runs."""
