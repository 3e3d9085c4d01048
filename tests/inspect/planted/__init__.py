"""Defects that are planted in a compilation, to be found by `bisect`."""
