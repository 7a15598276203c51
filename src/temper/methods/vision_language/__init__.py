"""Models that see and read: prompts learned for them, their data, and how they are fooled."""
