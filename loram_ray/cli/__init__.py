"""The ``loram`` command."""
