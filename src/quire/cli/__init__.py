"""The quire command. Imports nothing here: each subcommand pays only for what it uses."""
