"""The companion of the book: what its notebooks and pages import, on top of `dgkit`."""
