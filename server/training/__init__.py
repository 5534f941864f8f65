"""Training: a file of examples becomes an adapter on the very base that serves. Nothing of the server imports this."""
