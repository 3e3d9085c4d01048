"""Graph passes: pipeline.py is the ordered list; one pass is one file with one test file."""
