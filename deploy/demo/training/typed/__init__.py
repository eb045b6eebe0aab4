"""Generates dialogues with requests as people type them, from rules. Seeded.

`grammar.py` expands rules, `style.py` types them carefully or carelessly, `values.py` makes the
values, `intents.txt` has the tools and the requests for them. The other modules make dialogues.
"""
