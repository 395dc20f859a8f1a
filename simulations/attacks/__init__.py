"""Attacks on what a federation gives away: who was in the training, and what their image looks like."""
