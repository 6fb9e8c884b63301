"""The jobs of the longer subcommands."""
