"""Views on an FX graph: where a node comes from, what it may do, how to add one, and its digest."""
