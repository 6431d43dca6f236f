"""The web console: room kept for it; it will be a client of the service layer."""
