"""Figures of what PST looks at. Knows checkpoints and data."""
