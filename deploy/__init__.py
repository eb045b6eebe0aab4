"""Everything that starts or operates the system. Start at `cli.py`, then `launch.py`."""
