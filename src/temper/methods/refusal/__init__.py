"""When and how a model declines, and how often it does so wrongly."""
