"""Helpers without a domain: files, names, text and parsing, all with bounds."""
