"""The stages: each one function from a configuration and directories to one directory.

The command, the jobs, the tests and a notebook call the same functions.
"""
