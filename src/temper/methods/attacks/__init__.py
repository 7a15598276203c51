"""Authorised red-teaming: prompts searched against a model, to see what its defences are worth."""
