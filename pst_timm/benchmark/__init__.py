"""Speed, memory and cost of models and of the attention, measured in turn. Knows checkpoints."""
