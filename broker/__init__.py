"""The broker: a credential for one task, and proof that it is dead afterwards."""
