"""The paper's own tables and figures, at their size: protocol, generation, scores, study."""
