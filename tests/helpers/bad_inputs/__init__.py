"""Tables of bad inputs, one module for each kind; ``test_bad_inputs`` runs them all.

A row is a command in a folder with one change. To add rows, append to a module's ``ROWS``, or add a
module with ``ROWS`` and list it in ``test_bad_inputs.TABLES``.
"""
