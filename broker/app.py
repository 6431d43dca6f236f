"""The composition root: builds store, adapters, services and listeners from one settings object."""
