"""Constrained output: what clients ask for -> grammars -> compiled, in a process of its own."""
