"""The demo model: a tiny checkpoint in the real layout, for a first look and for tests."""
