"""Where a model is and what its small files say: folders, the hub, config.json, headers of weights; what is remembered."""
