"""Examples: programs to run, with python -m from the directory above."""
