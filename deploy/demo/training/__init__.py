"""Trains the demo model. Not part of the wheel."""
