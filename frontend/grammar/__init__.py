"""Constrained output: formats and tools -> grammars, compiled in another process."""
