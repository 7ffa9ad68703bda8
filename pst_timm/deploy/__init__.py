"""From a trained model to a light one that ships. Knows the engine."""
