"""One file for each wire format and direction: bodies in, replies out."""
