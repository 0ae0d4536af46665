"""What the paper claims and what was measured: results with their provenance, and verdicts."""
