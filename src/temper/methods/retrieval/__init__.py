"""Retrievers, rankers and retrieval-augmented answers."""
