"""What the notebooks measure, from a pipeline to plain numbers: a module per chapter or question."""
