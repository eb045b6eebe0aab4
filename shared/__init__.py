"""Shared by all processes: messages, config, errors. Start at `messages.py`."""
