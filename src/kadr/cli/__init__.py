"""The command line: one small file per verb. Results go to stdout, messages to stderr."""
