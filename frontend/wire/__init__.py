"""HTTP for all routes: bodies, errors, server-sent events."""
