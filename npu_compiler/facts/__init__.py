"""What is known about sizes that may be symbolic."""
