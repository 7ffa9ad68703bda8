"""What only a checkout needs, run from its root as `python -m scripts.NAME`; not part of the wheel."""
