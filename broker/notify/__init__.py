"""Signed webhooks: room kept for them, nothing is sent yet."""
