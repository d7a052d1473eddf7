"""Fuzzers of everything that reads files or text of others: `python -m tools.fuzz --minutes 60`.

A case is a folder: files by name. A target reads one, and may raise nothing but an `FxpressError`.
"""
