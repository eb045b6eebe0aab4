"""What all processes agree on: messages, config, errors. Start at `messages.py`."""
