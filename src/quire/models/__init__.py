"""Finding, reading and building models. Imports nothing here, so that `quire plan` pays only for what it uses."""
