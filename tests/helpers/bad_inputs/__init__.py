"""Tables of bad inputs, one module for each kind; ``test_bad_inputs`` runs them all.

A row is a command in a folder with one thing changed. To add some, append to a module's ``ROWS``,
or write a module with ``ROWS`` and name it in ``test_bad_inputs.TABLES``.
"""
