"""Imported as `glimmer.server`."""
