"""evaluate: how good the features of a store are. One file per task; each reads tables and never extracts again.

A task is a function `run(config, *, store, ...) -> Result`, and a command of the same name in cli.py.
"""
