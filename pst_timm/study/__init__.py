"""A grid of models and seeds on record: configuration, cells, runner, results, tables, plots. Knows the engine."""
