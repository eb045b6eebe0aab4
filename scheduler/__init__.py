"""The scheduler process: every request, every page number. Start at `core.py`."""
