"""From a rewritten program to a plan: what runs where, what waits for what, what memory lives how long."""
