"""The command line: a small file per verb. Stdout is data, stderr is talk."""
