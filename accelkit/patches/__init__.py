"""First floor: models and methods."""
