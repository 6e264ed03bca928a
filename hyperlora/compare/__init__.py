"""Methods against tasks, with controls, costs and intervals."""
