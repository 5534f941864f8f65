"""Ratios of one run. The engine waits here as it does in a server."""

from server.cli import bound_waiting

bound_waiting()
