"""How fine-tuning changes a model, seen from inside, and put right."""
