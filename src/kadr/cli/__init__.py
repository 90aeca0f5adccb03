"""The command line: one module per command. Results go to stdout, messages to stderr."""
