"""What the pages of the book show: figures, and text made from data at every build."""
