"""One file per kind of backend, a registry, and the conformance suite for them all."""
