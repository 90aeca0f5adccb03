"""Progress and results as people see them: in words, in notebooks, in players."""
