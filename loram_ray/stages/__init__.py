"""The stages: functions that take a configuration and write one directory.

The command line, the jobs, the tests and notebooks call the same functions.
"""
