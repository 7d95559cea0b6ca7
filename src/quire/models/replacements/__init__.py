"""What may stand in place of library modules: proposed from what was seen on the twin, carried out on the model."""
