"""The embedded trust domain, starters for real parts and the demo; left out of the production image."""
