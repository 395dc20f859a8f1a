"""A whole federation on one machine, out of client/ and server/ as deployed."""
