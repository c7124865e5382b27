"""All that a forward pass needs, from ids to logits. `modeling.py` is where to begin."""
