"""What every part of the package may use: paths, texts, tables, progress bars, complete files."""
