"""The models as the live page runs them: exported when the book is built, never tracked."""
