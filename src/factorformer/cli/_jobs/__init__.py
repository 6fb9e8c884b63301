"""What the longer subcommands do, step by step."""
