"""What crosses HTTP whatever the route: bodies, errors, server-sent events."""
