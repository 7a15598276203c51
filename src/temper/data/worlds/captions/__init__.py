"""The caption world: coloured shapes in eight styles, drawn from a seed, with everything that can be said about them."""
