"""The HTTP server: its routes, what they share, and the way to engines."""
