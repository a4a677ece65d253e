"""Which tokens a request keeps: what is collected while it runs, and the cut itself."""
