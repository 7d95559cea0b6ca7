"""Data only: the small models that come with quire. README.md is their card; `tools/train_bundled.py` makes them."""
