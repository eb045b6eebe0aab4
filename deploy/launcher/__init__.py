"""`glimmer serve`: checks, starts, watches and ends the processes of one server."""
