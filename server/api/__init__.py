"""The HTTP contract over the engine. Holds no tensors."""
