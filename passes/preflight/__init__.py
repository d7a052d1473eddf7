"""Before long work: what it will take, and whether there is room."""
