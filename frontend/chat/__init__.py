"""Shared by all chat routes: a conversation in, the assistant's messages out."""
