"""Constrained output: formats and tools -> grammars, checked in another process."""
