"""`glimmer serve`: checks the setup, then starts, watches and stops the processes of one server."""
