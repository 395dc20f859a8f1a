"""What both sides agree on; imports neither side."""
