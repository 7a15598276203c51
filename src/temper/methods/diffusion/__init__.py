"""Text-to-image and class-conditional diffusion: forgetting, attack, prompts, copying."""
