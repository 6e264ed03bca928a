"""Training and test items: where documents come from, what is asked of them, and how they are mixed."""
