"""Cost of models and distance between them, as figures, charts and reports."""
