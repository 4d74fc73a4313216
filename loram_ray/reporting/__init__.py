"""A run, a batch or a comparison as a page that people look at."""
