"""Threads wait here as they do in a server."""

from server.cli import bound_waiting

bound_waiting()
