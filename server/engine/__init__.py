"""The engine: token ids in, token ids and task results out. Knows nothing of HTTP; nothing here imports `api`."""
